"""Training of LaVIT's tokenizer and of its pixel decoders.

Stage 1: token selector, token merger and codebook are trained to reconstruct the features of a frozen encoder.

    loss = mean over patches of (1 − cos(x, x̂)) + λ (ρ − share of kept patches)² [+ commitment to the codes]

The share is computed over the batch of all processes, so an image with more content may keep more. The token selector's
gradient is estimated by flipping the decision of one patch per image: the change in reconstruction loss is the gradient
of that patch's probability. (A straight-through gradient is many times the real change for a dropped patch.)

Pixel decoders: a U-Net initialized from Stable Diffusion is conditioned on a frozen code decoder's features of an
image's codes, and trained with the noise-prediction loss. Our choices, unspecified in paper and repository: conditions
are dropped (`dropout`), replaced by the unconditional ones; heads (`unet_proj*`, `unet_attnpool`) are trained with the
U-Net.

Source: arXiv 2309.04669. Shape suffixes: B images, N patches, D vision width, C code width, T kept rows of all images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.diffusion.training import NoisyLatents, TrainedLayers, train_unet
from seed_multimodal.lavit.decoder import CodeDecoder, Head
from seed_multimodal.lavit.diffusion import is_sdxl, unconditional
from seed_multimodal.lavit.modeling import DynamicTokenizer, Generators, Selection
from seed_multimodal.nn.quantizer import VectorQuantizer
from seed_multimodal.seed.training import cosine
from seed_multimodal.settings import setting

FLIP_EVERY = 2  # flip a decision of every n-th image, which costs a forward pass
HEADS = ("unet_proj", "unet_attnpool")  # beginnings of the names of the code decoder's heads


@dataclass(frozen=True)
class LavitLossWeights:
    """Factors of the loss: `keep` is ρ, the share to keep; `ratio` is λ; `commitment` pulls rows to their codes."""

    keep: float = setting(1 / 3, minimum=0, maximum=1)
    ratio: float = setting(2.0, minimum=0)
    commitment: float = setting(1.0, minimum=0)


@dataclass(kw_only=True)
class LavitStage1Output:
    """Losses `[]` (`loss` is the weighted sum), the share of kept patches of all processes, the number of patches of
    each image, and the codes of all images."""

    loss: Tensor
    loss_cosine: Tensor
    loss_ratio: Tensor
    loss_commitment: Tensor | None
    kept: Tensor
    counts_B: Tensor
    codes_T: Tensor | None

    def scalars(self) -> dict[str, Tensor]:
        """Scalars for a log: parts of the loss, the kept share, and tokens per image (mean, deviation, extremes)."""
        names, counts_B = (
            ("loss_cosine", "loss_ratio", "loss_commitment", "kept"),
            self.counts_B.float(),
        )
        values = {name: getattr(self, name) for name in names} | {
            "tokens": counts_B.mean(),
            "tokens_deviation": counts_B.std(correction=0),
            "tokens_least": counts_B.min(),
            "tokens_most": counts_B.max(),
        }
        return {name: value.detach() for name, value in values.items() if value is not None}


class LavitStage1(nn.Module):
    """A dynamic tokenizer and its decoder, with the loss of stage 1; encoder, projector and U-Net heads are frozen.

    The tokenizer's quantizer is replaced by one with moving averages. `freeze_selector` keeps the token selector as it
    is once codes are used. `use_codes`, `codes` and `features` are those that `training.codebook.CodebookTask` needs.
    """

    def __init__(
        self,
        tokenizer: DynamicTokenizer,
        decoder: CodeDecoder,
        *,
        weights: LavitLossWeights | None = None,
        ema_decay: float = 0.99,
        freeze_selector: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer, self.decoder = tokenizer, decoder
        self.weights = weights or LavitLossWeights()
        self.freeze_selector, self.use_codes = freeze_selector, True
        self.codes: Tensor | None = None
        self.features: Tensor | None = None
        tokenizer.quantize = ema_codebook(tokenizer.quantize, ema_decay)
        for name, parameter in self.named_parameters():
            if name.startswith(("tokenizer.encoder.", "tokenizer.vit_proj.", "decoder.unet_")):
                parameter.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As usual; the frozen vision encoder stays in eval mode."""
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

    def forward(
        self,
        batch: Tensor,
        *,
        quantize: bool | None = None,
        generator: Generators = None,
        noise: Tensor | None = None,
    ) -> LavitStage1Output:
        """Loss of a batch of pixels `[B, 3, S, S]` or patch features `[B, N, D]`; `quantize`: with codes, by default as
        `use_codes`; `generator`, `noise`: of the token selection."""
        quantize = self.use_codes if quantize is None else quantize
        features_BND = self.patch_features(batch)
        selection = self.select(features_BND, quantize and self.freeze_selector, generator, noise)
        kept_BN = selection.keep_BN.detach() > 0.5
        rows_TC = self.codebook_queries(features_BND, kept_BN)
        decoded_TC, commitment, codes_T = (
            self.quantize(rows_TC) if quantize else (rows_TC, None, None)
        )
        errors_B, cosine_B = self.errors(features_BND, decoded_TC, kept_BN)
        own_share = (
            selection.keep_BN.mean()
        )  # the share of all processes has the gradient of this one's
        share = own_share + (mean_of_all(own_share.detach()) - own_share.detach())
        loss_ratio = (self.weights.keep - share).square()
        loss = errors_B.mean() + self.weights.ratio * loss_ratio
        if commitment is not None:
            count = torch.tensor(float(len(rows_TC)), device=rows_TC.device)
            commitment = commitment * (
                count / mean_of_all(count)
            )  # processes keep different numbers of rows
            loss = loss + self.weights.commitment * commitment
        if self.training and selection.log_probs_BN2.requires_grad:
            p_keep_BN = selection.log_probs_BN2[..., 0].exp()
            loss = loss + self.selection_loss(
                features_BND[::FLIP_EVERY],
                p_keep_BN[::FLIP_EVERY],
                kept_BN[::FLIP_EVERY],
                errors_B.detach()[::FLIP_EVERY],
                quantize,
            )
        self.features, self.codes = rows_TC.detach().float(), codes_T
        return LavitStage1Output(
            loss=loss,
            loss_cosine=cosine_B.mean(),
            loss_ratio=loss_ratio,
            loss_commitment=commitment,
            kept=share.detach(),
            counts_B=kept_BN.sum(1),
            codes_T=codes_T,
        )

    def select(
        self,
        features_BND: Tensor,
        frozen: bool = False,
        generator: Generators = None,
        noise: Tensor | None = None,
    ) -> Selection:
        """The token selection, in eval mode with a fixed seed by default; without gradient if `frozen`."""
        if not self.training and generator is None and noise is None:
            generator = torch.Generator(features_BND.device).manual_seed(0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            return self.tokenizer.select(features_BND, generator=generator, noise=noise)

    def codebook_queries(self, features_BND: Tensor, kept_BN: Tensor) -> Tensor:
        """Rows of the kept patches before the quantizer, on the unit sphere `[T, C]`."""
        merged_TD = self.tokenizer.merge(features_BND, kept_BN.float())[kept_BN]
        return self.quantize.prepare(self.tokenizer.to_codebook(merged_TD))

    def errors(
        self, features_BND: Tensor, rows_TC: Tensor, kept_BN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each image's part of the loss and its cosine loss, both `[B]`, when the decoder reads these rows."""
        rebuilt_BND = self.decoder.features(list(rows_TC.split(kept_BN.sum(1).tolist())))
        cosine_B = (1 - cosine(rebuilt_BND, features_BND)).mean(1)
        return cosine_B + self.other_errors(features_BND, rebuilt_BND), cosine_B

    def other_errors(self, features_BND: Tensor, rebuilt_BND: Tensor) -> Tensor | float:
        """Hook for further errors of each image, `[B]`."""
        return 0.0

    def selection_loss(
        self,
        features_BND: Tensor,
        p_keep_BN: Tensor,
        kept_BN: Tensor,
        errors_B: Tensor,
        quantize: bool,
    ) -> Tensor:
        """0, with the gradient of the expected loss with respect to `p_keep_BN`, estimated from one patch of each
        image that is decided the other way."""
        place_B1 = self.flipped_patches(features_BND)[:, None]
        was_kept_B = kept_BN.gather(1, place_B1)[:, 0]
        other_BN = kept_BN ^ F.one_hot(place_B1[:, 0], kept_BN.shape[1]).bool()
        other_BN = torch.where(
            other_BN.any(1, keepdim=True), other_BN, kept_BN
        )  # the last one stays
        with torch.no_grad():
            rows_TC = self.codebook_queries(features_BND, other_BN)
            if quantize:
                rows_TC = self.quantize.lookup(self.quantize.nearest(rows_TC))
            change_B = self.errors(features_BND, rows_TC, other_BN)[0] - errors_B
        cost_of_keeping_B = torch.where(was_kept_B, -change_B, change_B)
        expected = (
            kept_BN.shape[1] * (cost_of_keeping_B * p_keep_BN.gather(1, place_B1)[:, 0]).mean()
        )
        return expected - expected.detach()

    def flipped_patches(self, features_BND: Tensor) -> Tensor:
        """The patch of each image whose decision is tried the other way, int64 `[B]`."""
        return torch.randint(
            features_BND.shape[1], (len(features_BND),), device=features_BND.device
        )

    def codebook_points(self, batch: Tensor) -> Tensor:
        """Rows of a batch's kept patches before the quantizer `[T, C]`, for the codebook's start."""
        features_BND = self.patch_features(batch)
        return self.codebook_queries(features_BND, self.select(features_BND).keep_BN > 0.5)

    @torch.no_grad()
    def init_keep_share(self) -> None:
        """Set the token selector's last biases to initially keep about the share ρ, not one half."""
        keep = min(max(self.weights.keep, 1e-3), 1 - 1e-3)
        self.tokenizer.token_predictor.out_conv[4].bias.copy_(torch.tensor([keep, 1 - keep]).log())

    def trained_networks(self) -> tuple[DynamicTokenizer, CodeDecoder]:
        """The networks in eval mode, without the codebook's averages and the projector, which stage 2 trains."""
        trained = self.quantize
        codebook = VectorQuantizer(trained.size, trained.dim, unit_rows=True)
        codebook.embedding.weight = nn.Parameter(trained.embedding.weight.detach())
        self.tokenizer.quantize = codebook.to(trained.embedding.weight.device)
        self.tokenizer.vit_proj = None
        return self.tokenizer.requires_grad_(False).eval(), self.decoder.requires_grad_(
            False
        ).eval()


def ema_codebook(start: VectorQuantizer, decay: float) -> VectorQuantizer:
    """A quantizer on the unit sphere with moving averages, and the rows of `start`."""
    quantizer = VectorQuantizer(start.size, start.dim, unit_rows=True, ema_decay=decay)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(F.normalize(start.embedding.weight.float(), dim=-1))
        quantizer.ema_sum.copy_(quantizer.embedding.weight)
        quantizer.ema_count.fill_(1.0)
    return quantizer.to(start.embedding.weight.device)


def mean_of_all(value: Tensor) -> Tensor:
    """The mean of a scalar over all processes, without gradient."""
    if not dist.is_initialized():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


# ---- pixel decoders


class TrainedPixels(nn.Module):
    """U-Net and code decoder, whose blocks are frozen; null_embeds: as of `LavitDetokenizer`."""

    null_embeds: Tensor | None

    def __init__(self, unet: Any, decoder: CodeDecoder, null_embeds: Tensor | None = None) -> None:
        super().__init__()
        self.unet, self.decoder = unet, decoder
        self.register_buffer("null_embeds", null_embeds, persistent=False)

    def forward(
        self,
        noisy_latents: Tensor,
        steps: Tensor,
        rows: Sequence[Tensor],
        time_ids: Tensor,
        without: Tensor,
    ) -> Tensor:
        """The U-Net's prediction `[B, C, h, w]`, from the codebook's rows `[n, C]` of each image, `time_ids` `[B, 6]`
        (`size_ids`); `without`: bool `[B]`, which images have no conditions."""
        with torch.no_grad():
            features = self.decoder.features(rows)
        made, dtype = self.decoder.conditions(features), self.unet.dtype
        away, mask = unconditional(made.prompt_embeds, self.null_embeds)
        conditions: dict[str, Any] = {}
        if made.pooled is not None:
            pooled = made.pooled.masked_fill(without[:, None], 0)
            conditions["added_cond_kwargs"] = {
                "text_embeds": pooled.to(dtype),
                "time_ids": time_ids,
            }
        if mask is not None:
            conditions["encoder_attention_mask"] = mask | ~without[:, None]
        prompt = torch.where(without[:, None, None], away, made.prompt_embeds).to(dtype)
        return self.unet(
            noisy_latents.to(dtype), steps, encoder_hidden_states=prompt, **conditions
        ).sample

    def set_trainable(self, which: TrainedLayers = "all") -> None:
        """Switch on the heads and, of the U-Net, all or the keys and values of its attentions ("key_value")."""
        train_unet(self.unet, which)
        for name, parameter in self.decoder.named_parameters():
            parameter.requires_grad_(name.startswith(HEADS))


@dataclass(frozen=True)
class LavitPixelLoss:
    """The loss of a training step; dropout: share without conditions."""

    dropout: float = 0.1

    def __call__(
        self,
        model: nn.Module,
        schedule: Any,
        latents: Tensor,
        rows: Sequence[Tensor],
        time_ids: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Losses (`NoisyLatents.losses`) of `TrainedPixels` at random time steps by a `generator` on the CPU.

        latents: multiplied by the autoencoder's scaling factor.
        """
        without = torch.rand(len(latents), generator=generator) < self.dropout
        noised = NoisyLatents.sample(schedule, latents, generator)
        return noised.losses(
            model(noised.latents, noised.steps, rows, time_ids, without.to(latents.device))
        )


def decoder_for(unet: Any, place: str | Path, seed: int = 0) -> tuple[CodeDecoder, bool]:
    """A code decoder with heads for this U-Net, and whether they are new: stage 1's may be for the other kind."""
    read = unet.config
    head: Head = "highres" if is_sdxl(unet) else "lowres"
    found = CodeDecoder.from_pretrained(place, head=head)
    if (found.config.head, found.config.context_dim) == (head, read.cross_attention_dim):
        return found, False
    pooled = (
        read.projection_class_embeddings_input_dim - 6 * read.addition_time_embed_dim
        if is_sdxl(unet)
        else 0
    )
    config = dataclasses.replace(
        found.config,
        head=head,
        prompt_dim=read.cross_attention_dim - pooled,
        pooled_dim=pooled or found.config.pooled_dim,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = CodeDecoder(config)
    decoder.load_state_dict(
        {name: value for name, value in found.state_dict().items() if not name.startswith(HEADS)},
        strict=False,
    )
    return decoder.eval(), True
