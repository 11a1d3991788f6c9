"""Stage 1 of LaVIT: selector, merger and codebook learn by rebuilding a frozen tower's features from the kept patches.

    loss = mean over patches of (1 − cos(x, x̂)) + λ (ρ − share kept of the batch)² [+ commitment to the codes]

First without codes (`quantize=False`: merged rows, on the unit sphere, go into the decoder as they are), then with
them: the codebook starts at k-means centres of the rows and follows a moving average of what it is chosen for
(`training/codebook.py` says when). The share counts over the batch of all processes, never for a picture: one with more
to see may keep more. Every picture keeps one patch at least.

The selector learns from what its decisions change: one patch of a picture is decided the other way, the picture is
rebuilt again, and the difference in its loss is the gradient of that patch's probability. Note: a gradient straight
through the mask says it to first order, which for a patch that was dropped is many times the real change; with it the
selector of nano-lavit learnt nothing in 1,000 steps (docs/LOG.md).

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
from seed_multimodal.nn.quantizer import VectorQuantizer
from seed_multimodal.settings import setting
from seed_multimodal.tokenizers.lavit import DynamicTokenizer
from seed_multimodal.tokenizers.lavit_decoder import CodeDecoder
from seed_multimodal.tokenizers.lavit_selector import Generators, Selection
from seed_multimodal.tokenizers.stage2_base import cosine

REFERENCE = 0.18
"""Cosine loss at which the released tokenizer is said to have converged (about 0.3 where codes were used from the
start, and fewer than 2,000 of 16,384 of them)."""
TRIED = 2
"""Of one picture in so many a decision is tried the other way: rebuilding costs as much as the loss's own forward."""


@dataclass(frozen=True)
class LavitStage1Weights:
    """Factors of the loss: `keep` is ρ, the share to be kept; `ratio` is λ; `commitment` pulls rows to their codes."""

    keep: float = setting(1 / 3, least=0, most=1)
    ratio: float = setting(2.0, least=0)
    commitment: float = setting(1.0, least=0)


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

    Attributes:
        use_codes, codes, features: see `training.codebook.CodedModel`.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    def __init__(self, tokenizer: DynamicTokenizer, decoder: CodeDecoder, *, weights: LavitStage1Weights | None = None,
                 ema_decay: float = 0.99, freeze_selector: bool = False) -> None:
        super().__init__()
        config = tokenizer.config
        for what, ours, theirs in (("patches", config.patches, decoder.config.tokens),
                                   ("numbers in a code's row", config.codebook_dim, decoder.config.code_dim),
                                   ("numbers in a patch's features", config.vit.width, decoder.config.feature_dim)):
            if ours != theirs:
                raise ConfigError(f"The tokenizer has {ours} {what}, the decoder {theirs}.")
        self.tokenizer, self.decoder = tokenizer, decoder
        self.weights = weights or LavitStage1Weights()
        self.freeze_selector, self.use_codes = freeze_selector, True
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
        selection = self.select(features_BND, frozen=quantize and self.freeze_selector, generator=generator,
                                noise=noise)
        kept_BN = selection.keep_BN.detach() > 0.5
        rows_TC, commitment, codes_T = self.rows_of(features_BND, kept_BN), None, None
        read_TC = rows_TC
        if quantize:
            read_TC, commitment, codes_T = self.quantize(rows_TC)
            commitment = commitment * weight_of_own(len(rows_TC), rows_TC.device)
        errors_B, cosine_B = self.errors(features_BND, read_TC, kept_BN)
        share = mean_of_all(selection.keep_BN.mean())
        loss_ratio = (self.weights.keep - share).square()
        loss = errors_B.mean() + self.weights.ratio * loss_ratio
        if commitment is not None:
            loss = loss + self.weights.commitment * commitment
        if self.training and selection.log_probs_BN2.requires_grad:
            loss = loss + self.decisions(features_BND[::TRIED], selection.p_keep_BN[::TRIED], kept_BN[::TRIED],
                                         errors_B.detach()[::TRIED], quantize)
        self.features, self.codes = rows_TC.detach().float(), codes_T
        return LavitStage1Output(loss=loss, loss_cosine=cosine_B.mean(), loss_ratio=loss_ratio,
                                 loss_commitment=commitment, kept=share.detach(), counts_B=kept_BN.sum(1),
                                 rows_TC=rows_TC, codes_T=codes_T)

    def select(self, features_BND: Tensor, *, frozen: bool = False, generator: Generators = None,
               noise: Tensor | None = None) -> Selection:
        """The draw, out of training with a fixed seed unless one is given; a `frozen` selector gets no gradient."""
        if not self.training and generator is None and noise is None:
            generator = torch.Generator(features_BND.device).manual_seed(0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            return self.tokenizer.select(features_BND, generator=generator, noise=noise)

    def rows_of(self, features_BND: Tensor, kept_BN: Tensor) -> Tensor:
        """Rows of the kept patches before the quantiser, on the unit sphere `[T, C]`."""
        merged_TD = self.tokenizer.merge(features_BND, kept_BN.float())[kept_BN]
        return self.quantize.prepare(self.tokenizer.to_codebook(merged_TD))

    def errors(self, features_BND: Tensor, rows_TC: Tensor, kept_BN: Tensor) -> tuple[Tensor, Tensor]:
        """What each picture adds to the loss, and its cosine loss, both `[B]`, when the decoder reads these rows."""
        rebuilt_BND = self.decoder.features(list(rows_TC.split(kept_BN.sum(1).tolist())))
        cosine_B = (1 - cosine(rebuilt_BND, features_BND)).mean(1)
        return cosine_B + self.other_errors(features_BND, rebuilt_BND), cosine_B

    def other_errors(self, features_BND: Tensor, rebuilt_BND: Tensor) -> Tensor | float:
        """What a picture adds beside it, `[B]`: nothing here."""
        return 0.0

    def decisions(self, features_BND: Tensor, p_keep_BN: Tensor, kept_BN: Tensor, errors_B: Tensor, quantize: bool
                  ) -> Tensor:
        """0, with the gradient of the expected loss in the probabilities of being kept, estimated from one patch of
        each picture that is decided the other way."""
        place_B1 = self.places(features_BND)[:, None]
        was_B = kept_BN.gather(1, place_B1)[:, 0]
        other_BN = kept_BN ^ F.one_hot(place_B1[:, 0], kept_BN.shape[1]).bool()
        other_BN = torch.where(other_BN.any(1, keepdim=True), other_BN, kept_BN)  # the last one stays
        with torch.no_grad():
            rows_TC = self.rows_of(features_BND, other_BN)
            if quantize:
                rows_TC = self.quantize.lookup(self.quantize.nearest(rows_TC))
            change_B = self.errors(features_BND, rows_TC, other_BN)[0] - errors_B
        of_keeping_B = torch.where(was_B, -change_B, change_B)
        expected = kept_BN.shape[1] * (of_keeping_B * p_keep_BN.gather(1, place_B1)[:, 0]).mean()
        return expected - expected.detach()

    def places(self, features_BND: Tensor) -> Tensor:
        """The patch of each picture whose decision is tried the other way, int64 `[B]`."""
        return torch.randint(features_BND.shape[1], (len(features_BND),), device=features_BND.device)

    def codebook_points(self, batch: Tensor) -> Tensor:
        """Rows of a batch's kept patches before the quantiser `[T, C]`, for the codebook's start."""
        features_BND = self.patch_features(batch)
        kept_BN = self.select(features_BND).keep_BN > 0.5
        return self.rows_of(features_BND, kept_BN)

    @torch.no_grad()
    def start_share(self) -> None:
        """Set the selector's last biases so that it begins by keeping about the share ρ, which the ratio term then only
        has to hold: from one half on, many steps go by in which it moves all patches alike."""
        last = next(part for part in reversed(list(self.tokenizer.token_predictor.out_conv))
                    if isinstance(part, nn.Linear))
        keep = min(max(self.weights.keep, 1e-3), 1 - 1e-3)
        last.bias.copy_(torch.tensor([keep, 1 - keep]).log())

    def finished(self) -> tuple[DynamicTokenizer, CodeDecoder]:
        """The trained parts in eval mode, the codebook without its averages, and without the projector, which stage 2
        trains; the tensors are this model's own."""
        trained = self.quantize
        codebook = VectorQuantizer(trained.size, trained.dim, unit_rows=True)
        codebook.embedding.weight = nn.Parameter(trained.embedding.weight.detach())
        self.tokenizer.quantize = codebook.to(trained.embedding.weight.device)
        self.tokenizer.vit_proj = None
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
