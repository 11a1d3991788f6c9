"""Training of LaVIT: losses of its tokenizer, its language model and its pixel decoders.

Stage 1: token selector, token merger and codebook are trained to reconstruct the features of a
frozen encoder.

    loss = mean over patches of (1 − cos(x, x̂)) + λ (ρ − share of kept patches)²
           [+ commitment to the codes]

The share is computed over the batch of all processes, so an image with more content may keep more.
The token selector's gradient is estimated by flipping the decision of one patch per image: the
change in reconstruction loss is the gradient of that patch's probability. (A straight-through
gradient is many times the real change for a dropped patch.)

Stage 2: the language model's loss (`training.llm.loss`) with the embeddings of the trained
token merger at the tokens of input images.

Pixel decoders (`train_pixels`): a U-Net initialized from Stable Diffusion is conditioned on a
frozen code decoder's features of an image's codes, and trained with the noise-prediction loss. Our
choices, unspecified in paper and repository: conditions are dropped, replaced by the unconditional
ones; heads (`unet_proj*`, `unet_attnpool`) are trained with the U-Net.

Source: arXiv 2309.04669. Shape suffixes: B images, N patches, D vision width, C code width, T kept
rows of all images.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.device import seeded
from seed_multimodal.diffusion.networks import is_sdxl, pooled_dim
from seed_multimodal.models.lavit.decoder import CodeDecoder, Head
from seed_multimodal.models.lavit.modeling import DynamicTokenizer, Generators, Selection
from seed_multimodal.nn.layers import cosine
from seed_multimodal.nn.quantizer import VectorQuantizer
from seed_multimodal.settings import fraction, non_negative
from seed_multimodal.training.llm.loss import LossModule, LossParts, LossWeights, find_llama

FLIP_EVERY = 2  # a decision of every n-th image is flipped, which costs a forward pass
HEADS = ("unet_proj", "unet_attnpool")  # beginnings of the names of the code decoder's heads
# Frozen in stage 1: the encoder, and parts of later trainings.
FROZEN = ("tokenizer.encoder.", "tokenizer.vit_proj.", "decoder.unet_")


@dataclass(frozen=True)
class LavitLossWeights:
    """Factors of the loss.

    Attributes:
        keep: ρ, the share of patches to keep.
        ratio: λ.
        commitment: pulls rows to their codes.
    """

    keep: float = fraction(1 / 3)
    ratio: float = non_negative(2.0)
    commitment: float = non_negative(1.0)


@dataclass
class LavitStage1Output:
    """Loss of a batch, and what it was reconstructed from.

    metrics: for the log: the parts of the loss, the share of kept patches, tokens of an image.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    codes_T: Tensor | None  # None: without codes


class LavitStage1(nn.Module):
    """A dynamic tokenizer and its decoder, with the loss of stage 1.

    Encoder, projector and U-Net heads are frozen; the codebook follows moving averages. `use_codes`
    is for `training.codebook.CodebookTask`.

    freeze_selector: the token selector is not trained once codes are used.
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
        self.tokenizer = tokenizer
        self.decoder = decoder
        self.weights = weights or LavitLossWeights()
        self.freeze_selector = freeze_selector
        self.use_codes = True
        # The averages start as if each code had had one feature.
        self.quantize.start_averages(ema_decay)
        self.quantize.ema_count.fill_(1.0)
        self.quantize.ema_sum.copy_(self.quantize.embedding.weight)
        for name, parameter in self.named_parameters():
            if name.startswith(FROZEN):
                parameter.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As usual; the frozen vision encoder stays in eval mode."""
        super().train(mode)
        self.tokenizer.encoder.eval()
        return self

    @property
    def skips_parameters(self) -> bool:
        """A frozen token selector has no gradients once codes are used."""
        return self.freeze_selector

    @property
    def quantize(self) -> VectorQuantizer:
        """The codebook in training."""
        return self.tokenizer.quantize

    def patch_features(self, batch: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]`, or features, → `[B, N, D]` fp32 without gradient."""
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
        """Loss of a batch of pixels `[B, 3, S, S]` or patch features `[B, N, D]`.

        quantize: with codes; None: as `use_codes`.
        generator, noise: of the token selection.
        """
        # 1. Select tokens, quantize their rows, and reconstruct the features.
        quantize = self.use_codes if quantize is None else quantize
        features_BND = self.patch_features(batch)
        selection = self.select(features_BND, quantize and self.freeze_selector, generator, noise)
        mask_BN = selection.keep_BN.detach() > 0.5
        queries_TC = self.codebook_queries(features_BND, mask_BN)
        rows_TC, commitment, codes_T = queries_TC, None, None
        if quantize:
            rows_TC, commitment, codes_T = self.quantize(queries_TC)
        errors_B, cosine_B = self.errors(features_BND, rows_TC, mask_BN)

        # 2. The share of all processes, with the gradient of this one's.
        local_share = selection.keep_BN.mean()
        share = local_share + (mean_of_all(local_share.detach()) - local_share.detach())
        loss_ratio = (self.weights.keep - share).square()
        loss = errors_B.mean() + self.weights.ratio * loss_ratio

        # 3. Each row has the same weight, though processes keep different numbers of them.
        if commitment is not None:
            count = torch.tensor(float(len(queries_TC)), device=queries_TC.device)
            commitment = commitment * (count / mean_of_all(count))
            loss = loss + self.weights.commitment * commitment

        # 4. The token selector's gradient.
        if self.training and selection.log_probs_BN2.requires_grad:
            p_keep_BN = selection.log_probs_BN2[..., 0].exp()
            loss = loss + self.selection_loss(
                features_BND[::FLIP_EVERY],
                p_keep_BN[::FLIP_EVERY],
                mask_BN[::FLIP_EVERY],
                errors_B.detach()[::FLIP_EVERY],
                quantize,
            )

        # 5. The log.
        counts_B = mask_BN.sum(1).float()
        metrics = {
            "loss_cosine": cosine_B.mean(),
            "loss_ratio": loss_ratio,
            "kept": share,
            "tokens": counts_B.mean(),
            "tokens_deviation": counts_B.std(correction=0),
            "tokens_least": counts_B.min(),
            "tokens_most": counts_B.max(),
        }
        if commitment is not None:
            metrics["loss_commitment"] = commitment
        metrics = {name: value.detach() for name, value in metrics.items()}
        return LavitStage1Output(loss, metrics, codes_T)

    def select(
        self,
        features_BND: Tensor,
        frozen: bool = False,
        generator: Generators = None,
        noise: Tensor | None = None,
    ) -> Selection:
        """The token selection, without gradient if `frozen`; in eval mode with a fixed seed."""
        if not self.training and generator is None and noise is None:
            generator = torch.Generator(features_BND.device).manual_seed(0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            return self.tokenizer.select(features_BND, generator=generator, noise=noise)

    def codebook_queries(self, features_BND: Tensor, mask_BN: Tensor) -> Tensor:
        """Rows of the kept patches before the quantizer, on the unit sphere `[T, C]`."""
        merged_TD = self.tokenizer.merge(features_BND, mask_BN.float())[mask_BN]
        return self.quantize.prepare(self.tokenizer.to_codebook(merged_TD))

    def errors(
        self, features_BND: Tensor, rows_TC: Tensor, mask_BN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each image's part of the loss, and its cosine loss, both `[B]`.

        rows_TC: what the decoder reads, of the patches in `mask_BN`.
        """
        counts = mask_BN.sum(1).tolist()
        rebuilt_BND = self.decoder.features(list(rows_TC.split(counts)))
        cosine_B = (1 - cosine(rebuilt_BND, features_BND)).mean(1)
        return cosine_B + self.other_errors(features_BND, rebuilt_BND), cosine_B

    def other_errors(self, features_BND: Tensor, rebuilt_BND: Tensor) -> Tensor | float:
        """Hook for further errors of each image, `[B]`."""
        return 0.0

    def selection_loss(
        self,
        features_BND: Tensor,
        p_keep_BN: Tensor,
        mask_BN: Tensor,
        errors_B: Tensor,
        quantize: bool,
    ) -> Tensor:
        """0, with the gradient of the expected loss with respect to `p_keep_BN`.

        It is estimated from one patch of each image that is decided the other way; this patch
        stands for all N.

        mask_BN: the decisions.
        errors_B: each image's part of the loss with them.
        """
        # 1. Flip the decision about a patch; an image's only kept patch stays.
        n_patches = mask_BN.shape[1]
        patch_B = torch.randint(n_patches, (len(mask_BN),), device=features_BND.device)
        flipped_BN = mask_BN ^ F.one_hot(patch_B, n_patches).bool()
        flipped_BN = torch.where(flipped_BN.any(1, keepdim=True), flipped_BN, mask_BN)

        # 2. The change of the loss.
        with torch.no_grad():
            rows_TC = self.codebook_queries(features_BND, flipped_BN)
            if quantize:
                rows_TC = self.quantize.lookup(self.quantize.nearest(rows_TC))
            flipped_errors_B, _ = self.errors(features_BND, rows_TC, flipped_BN)
            change_B = flipped_errors_B - errors_B

        # 3. What keeping the patch costs, times its probability.
        patch_B1 = patch_B[:, None]
        was_keep_B = mask_BN.gather(1, patch_B1)[:, 0]
        p_keep_B = p_keep_BN.gather(1, patch_B1)[:, 0]
        cost_of_keeping_B = torch.where(was_keep_B, -change_B, change_B)
        expected = n_patches * (cost_of_keeping_B * p_keep_B).mean()
        return expected - expected.detach()

    def codebook_points(self, batch: Tensor) -> Tensor:
        """Queries of a batch's kept patches `[T, C]`, for the codebook's start."""
        features_BND = self.patch_features(batch)
        return self.codebook_queries(features_BND, self.select(features_BND).keep_BN > 0.5)

    @torch.no_grad()
    def init_keep_share(self) -> None:
        """Set the token selector's last biases to keep about the share ρ at first, not one half."""
        keep = min(max(self.weights.keep, 1e-3), 1 - 1e-3)
        last_layer = self.tokenizer.token_predictor.out_conv[4]
        last_layer.bias.copy_(torch.tensor([keep, 1 - keep]).log())

    def trained_networks(self) -> tuple[DynamicTokenizer, CodeDecoder]:
        """The networks in eval mode, without the projector, which stage 2 trains."""
        self.tokenizer.vit_proj = None
        self.tokenizer.requires_grad_(False).eval()
        self.decoder.requires_grad_(False).eval()
        return self.tokenizer, self.decoder


def mean_of_all(value: Tensor) -> Tensor:
    """The mean of a scalar over all processes, without gradient."""
    if not dist.is_initialized():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


# ---- the language model


class UnifiedLoss(LossModule):
    """`LossModule` with image features. Parameter names: `llm.*`, `causal_encoder.*`, `vit_proj.*`.

    The token merger runs in every step, on dummy input if the batch has no input image, so that all
    processes compute gradients of the same parameters and ZeRO-3 gathers them in the same order.
    """

    def __init__(
        self, llm: nn.Module, merger: nn.Module, projector: nn.Linear, weights: LossWeights
    ) -> None:
        super().__init__(llm, weights)
        self.causal_encoder = merger
        self.vit_proj = projector

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
        keep: Tensor | None = None,
        patch_indices: Tensor | None = None,
        token_indices: Tensor | None = None,
    ) -> LossParts:
        """As `LossModule`, with the fields of `rows.ReadyBatch`."""
        embeds = find_llama(self.llm).get_input_embeddings()(input_ids)  # [B, L, W]
        if features is None or keep is None or patch_indices is None or token_indices is None:
            dummy = self.vit_proj.weight.new_zeros(1, 1, self.vit_proj.in_features)
            output = self.merge(dummy, dummy.new_ones(1, 1))
            embeds = embeds + 0.0 * output.sum().to(embeds)
        else:
            merged = self.merge(features, keep).flatten(0, 1)  # [n · N, W]
            selected = merged.index_select(0, patch_indices).to(embeds)  # [T, W]
            flat_embeds = embeds.flatten(0, 1)  # [B · L, W]
            embeds = flat_embeds.index_copy(0, token_indices, selected).view_as(embeds)
        return super().forward(input_ids, labels, position_ids, attention_mask, embeds)

    def merge(self, features: Tensor, keep: Tensor) -> Tensor:
        """Features `[n, N, D]`, selection mask `[n, N]` → language model's input `[n, N, W]`."""
        features = features.to(self.vit_proj.weight.dtype)
        return self.vit_proj(self.causal_encoder(features, keep))


# ---- pixel decoders


def decoder_for(unet: nn.Module, folder: str | Path, seed: int = 0) -> tuple[CodeDecoder, bool]:
    """A code decoder with heads for this U-Net, and whether they are new.

    folder: of a decoder; its heads may be for the other kind of U-Net.
    seed: of new heads.
    """
    head: Head = "highres" if is_sdxl(unet) else "lowres"
    context_dim = unet.config.cross_attention_dim
    stored = CodeDecoder.from_pretrained(folder, head=head)
    if stored.config.head == head and stored.config.context_dim == context_dim:
        return stored, False

    # 1. Sizes of the heads. Only SDXL's U-Net reads pooled embeddings.
    config = dataclasses.replace(stored.config, head=head, prompt_dim=context_dim)
    if is_sdxl(unet):
        n_pooled = pooled_dim(unet)
        config = dataclasses.replace(config, prompt_dim=context_dim - n_pooled, pooled_dim=n_pooled)

    # 2. New heads on the stored blocks.
    with seeded(seed):
        decoder = CodeDecoder(config)
    blocks = {
        name: value for name, value in stored.state_dict().items() if not name.startswith(HEADS)
    }
    decoder.load_state_dict(blocks, strict=False)
    return decoder.eval(), True
