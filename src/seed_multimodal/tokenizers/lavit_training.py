"""Stage 1 of LaVIT: selector, merger and codebook learn by rebuilding a frozen tower's features from the kept patches.

    loss = mean over patches of (1 − cos(x, x̂)) + λ (ρ − share kept of the batch)² [+ commitment to the codes]

First without codes (`quantize=False`: merged rows, on the unit sphere, go into the decoder as they are), then with
them: the codebook starts at k-means centres of the rows and follows a moving average of what it is chosen for
(`training/codebook.py` says when). The share counts over the batch of all processes, never for a picture: one with more
to see may keep more. Every picture keeps one patch at least.

Note: the decoder gets all patches, and the dropped ones' scores are lowered by ln ε; so the selector also learns what a
patch would have changed had it been kept, which rows that are simply left out cannot tell. What the decoder sees of
dropped rows is nothing that its scores could make up for (`HIDDEN`).

Source: specification §5.1. Shape suffixes: B pictures, N patches, D vision width, C code width, T kept rows of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import setting
from seed_multimodal.tokenizers.lavit import DynamicTokenizer
from seed_multimodal.tokenizers.lavit_decoder import CodeDecoder
from seed_multimodal.tokenizers.lavit_selector import Generators
from seed_multimodal.tokenizers.quantizer import VectorQuantizer
from seed_multimodal.tokenizers.stage2_base import cosine

HIDDEN = 1e-20
"""Weight of a dropped row in the decoder, against that of a kept one with the same score. It has to be far below what
scores can make up for: with 1e-6 a decoder learned to read dropped rows, and rebuilt far worse from kept ones alone."""
REFERENCE = 0.18
"""Cosine loss at which the released tokenizer is said to have converged (about 0.3 where codes were used from the
start, and fewer than 2,000 of 16,384 of them)."""


@dataclass(frozen=True)
class LavitStage1Weights:
    """Factors of the loss: `keep` is ρ, the share to be kept; `ratio` is λ; `commitment` pulls rows to their codes.

    `patch`: the most by which keeping one patch may be said to change its picture's loss (0: any). To first order a
    dropped patch, or one where attention sees hardly any other, seems to change it many times over: on nano's features
    gradients were 40 to 150 times as large as with 0.05, and half of the patches were kept where a third was wanted.
    """

    keep: float = setting(1 / 3, least=0, most=1)
    ratio: float = setting(2.0, least=0)
    commitment: float = setting(1.0, least=0)
    patch: float = setting(0.05, least=0)


@dataclass(kw_only=True)
class LavitStage1Output:
    """Losses `[]`, of which `loss` is the weighted sum, and what the log tells.

    Attributes:
        kept: share of the patches kept in the batch, of all processes. counts_B: of each picture, int64.
        rows_TC: rows of kept patches before the quantiser, on the unit sphere; codes_T: theirs, None without codes.
    """

    loss: Tensor
    loss_cosine: Tensor
    loss_ratio: Tensor
    loss_commitment: Tensor | None
    kept: Tensor
    counts_B: Tensor
    rows_TC: Tensor
    codes_T: Tensor | None

    def numbers(self) -> dict[str, Tensor]:
        """Scalars for a log: the loss's parts, the kept share, and tokens of a picture (mean, deviation, extremes)."""
        counts_B = self.counts_B.float()
        commitment = {} if self.loss_commitment is None else {"loss_commitment": self.loss_commitment}
        return {name: value.detach() for name, value in {
            "loss_cosine": self.loss_cosine, "loss_ratio": self.loss_ratio, **commitment, "kept": self.kept,
            "tokens": counts_B.mean(), "tokens_deviation": counts_B.std(correction=0),
            "tokens_least": counts_B.min(), "tokens_most": counts_B.max()}.items()}


class LavitStage1(nn.Module):
    """A dynamic tokenizer and its decoder, with the loss of stage 1.

    Args:
        tokenizer: its tower is frozen, its projector (of stage 2) too; its quantiser is replaced by one that follows
            moving averages, with the same rows.
        decoder: of the same number of patches; the heads for the U-Net are not trained here.
        ema_decay: of the codebook's moving averages.
        freeze_selector: once codes are used, the selector stays as it is (both were told of the released training).
        look_ahead: False: rows of dropped patches do not reach the decoder, and no gradient comes back from them.

    Attributes:
        use_codes, codes, features: see `training.codebook.CodedModel`.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    def __init__(self, tokenizer: DynamicTokenizer, decoder: CodeDecoder, *, weights: LavitStage1Weights | None = None,
                 ema_decay: float = 0.99, freeze_selector: bool = False, look_ahead: bool = True) -> None:
        super().__init__()
        config = tokenizer.config
        for what, ours, theirs in (("patches", config.patches, decoder.config.tokens),
                                   ("numbers in a code's row", config.codebook_dim, decoder.config.code_dim),
                                   ("numbers in a patch's features", config.vit.width, decoder.config.feature_dim)):
            if ours != theirs:
                raise ConfigError(f"The tokenizer has {ours} {what}, the decoder {theirs}.")
        self.tokenizer, self.decoder = tokenizer, decoder
        self.weights = weights or LavitStage1Weights()
        self.freeze_selector, self.look_ahead = freeze_selector, look_ahead
        self.use_codes = True
        self.codes: Tensor | None = None
        self.features: Tensor | None = None
        tokenizer.quantize = moving_codebook(tokenizer.quantize, ema_decay)
        self.freeze_parts()
        self.train()

    def freeze_parts(self) -> None:
        """No gradients for the tower, the projector, and the decoder's heads for a U-Net."""
        self.tokenizer.encoder.requires_grad_(False)
        if self.tokenizer.vit_proj is not None:
            self.tokenizer.vit_proj.requires_grad_(False)
        for name, part in self.decoder.named_children():
            if name.startswith("unet_"):
                part.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """As usual; the frozen tower stays in eval mode."""
        super().train(mode)
        self.tokenizer.encoder.eval()
        return self

    @property
    def quantize(self) -> VectorQuantizer:
        """The codebook in training."""
        return self.tokenizer.quantize

    def patch_features(self, batch: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]`, or features as they are, → `[B, N, D]` fp32 without gradient."""
        if batch.ndim == 3:
            return batch.float()
        with torch.no_grad():
            return self.tokenizer.patch_features(batch)

    def forward(self, batch: Tensor, *, quantize: bool | None = None, generator: Generators = None,
                noise: Tensor | None = None) -> LavitStage1Output:
        """Loss of a batch.

        Args:
            batch: pixels `[B, 3, S, S]` or a frozen tower's patch features `[B, N, D]`.
            quantize: with codes; by default as `use_codes` says.
            generator, noise: of the selector's draw; by default torch's global generator, out of training a fixed seed.
        """
        quantize = self.use_codes if quantize is None else quantize
        features_BND = self.patch_features(batch)
        keep_BN, rows_BNC = self.select_rows(features_BND, frozen=quantize and self.freeze_selector,
                                             generator=generator, noise=noise)
        kept_BN = keep_BN.detach() > 0.5
        kept_TC, commitment, codes_T = rows_BNC[kept_BN], None, None
        if quantize:
            quantised_TC, commitment, codes_T = self.quantize(kept_TC)
            commitment = commitment * weight_of_own(len(kept_TC), kept_TC.device)
            rows_BNC = rows_BNC.masked_scatter(kept_BN[..., None], quantised_TC.to(rows_BNC.dtype))
        rebuilt_BND = self.rebuild(rows_BNC, self.limited(keep_BN))
        loss_cosine = (1 - cosine(rebuilt_BND, features_BND)).mean()
        share = mean_of_all(keep_BN.mean())
        loss_ratio = (self.weights.keep - share).square()
        loss = loss_cosine + self.weights.ratio * loss_ratio
        if commitment is not None:
            loss = loss + self.weights.commitment * commitment
        self.features, self.codes = kept_TC.detach().float(), codes_T
        return LavitStage1Output(loss=loss, loss_cosine=loss_cosine, loss_ratio=loss_ratio, loss_commitment=commitment,
                                 kept=share.detach(), counts_B=kept_BN.sum(1), rows_TC=kept_TC, codes_T=codes_T)

    def select_rows(self, features_BND: Tensor, *, frozen: bool = False, generator: Generators = None,
                    noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features → kept or not `[B, N]`, straight through, and every patch's row before the quantiser `[B, N, C]`."""
        if not self.training and generator is None and noise is None:
            generator = torch.Generator(features_BND.device).manual_seed(0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            keep_BN = self.tokenizer.select(features_BND, generator=generator, noise=noise).keep_BN
        merged_BND = self.tokenizer.merge(features_BND, self.limited(keep_BN))
        return keep_BN, self.quantize.prepare(self.tokenizer.to_codebook(merged_BND))

    def limited(self, keep_BN: Tensor) -> Tensor:
        """The same, with a gradient of `weights.patch` in each picture's loss at most."""
        if not self.weights.patch or not keep_BN.requires_grad:
            return keep_BN
        most, passed = self.weights.patch / len(keep_BN), keep_BN.clone()
        passed.register_hook(lambda gradient: gradient.clamp(-most, most))
        return passed

    def rebuild(self, rows_BNC: Tensor, keep_BN: Tensor) -> Tensor:
        """Rows of all patches `[B, N, C]`, kept or not → features `[B, N, D]`, as `decoder.features` of the kept ones,
        by which they are made out of training (see the note above); a row's position is its rank among those kept."""
        decoder = self.decoder
        if not (self.look_ahead and self.training):
            return decoder.features([rows[keep] for rows, keep in zip(rows_BNC, keep_BN.detach() > 0.5, strict=True)])
        rank_BN = (keep_BN.detach().round().long().cumsum(1) - 1).clamp_min(0)
        rows_BND = decoder.in_proj(rows_BNC) + decoder.pos_embed[0][rank_BN]
        hidden_BN = torch.log(keep_BN + HIDDEN * (1 - keep_BN.detach()))
        x_BND = decoder.query_embed.expand(len(rows_BND), -1, -1)
        for block in decoder.blocks:
            x_BND = block(x_BND, rows_BND, hidden_BN.to(rows_BND.dtype))
        return decoder.decode_task_layer(decoder.norm(x_BND))

    def codebook_points(self, batch: Tensor) -> Tensor:
        """Rows of a batch's kept patches before the quantiser `[T, C]`, for the codebook's start."""
        keep_BN, rows_BNC = self.select_rows(self.patch_features(batch))
        return rows_BNC[keep_BN > 0.5]

    @torch.no_grad()
    def start_share(self) -> None:
        """Set the selector's last biases so that it begins by keeping about the share ρ, which the ratio term then only
        has to hold: from one half on, many steps go by in which it moves all patches alike."""
        last = next(part for part in reversed(list(self.tokenizer.token_predictor.out_conv))
                    if isinstance(part, nn.Linear))
        keep = min(max(self.weights.keep, 1e-3), 1 - 1e-3)
        last.bias.copy_(torch.tensor([keep, 1 - keep]).log())

    def finished(self) -> tuple[DynamicTokenizer, CodeDecoder]:
        """The trained parts in eval mode, the codebook without its averages; the tensors are this model's own."""
        trained = self.quantize
        codebook = VectorQuantizer(trained.size, trained.dim, unit_rows=True)
        codebook.embedding.weight = nn.Parameter(trained.embedding.weight.detach())
        self.tokenizer.quantize = codebook.to(trained.embedding.weight.device)
        return self.tokenizer.requires_grad_(False).eval(), self.decoder.requires_grad_(False).eval()


def moving_codebook(start: VectorQuantizer, decay: float) -> VectorQuantizer:
    """A quantiser on the unit sphere that follows moving averages, with the rows of `start`."""
    made = VectorQuantizer(start.size, start.dim, legacy=True, unit_rows=True, ema_decay=decay)
    with torch.no_grad():
        made.embedding.weight.copy_(F.normalize(start.embedding.weight.float(), dim=-1))
        made.ema_sum.copy_(made.embedding.weight)
        made.ema_count.fill_(1.0)
    return made.to(start.embedding.weight.device)


def mean_of_all(value: Tensor) -> Tensor:
    """The mean of a scalar over all processes; its gradient is that of this process's own share, which an engine that
    averages gradients makes that of the mean."""
    return value + (_mean(value.detach()) - value.detach())


def weight_of_own(rows: int, device: torch.device) -> Tensor:
    """What makes a mean over this process's rows its part of the mean over those of all, once processes are averaged:
    they keep different numbers of rows."""
    own = torch.tensor(float(rows), device=device)
    return own / _mean(own)


def _mean(value: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
