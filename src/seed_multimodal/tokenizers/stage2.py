"""Stage 2: a codebook between the frozen Q-Former and two decoders, one back to its queries, one to an image embedding.

Loss = 5 · codebook + 2 · (1 - cosine to the Q-Former's output) + 0.5 · MSE to the target image embedding.
The model is a `Seed2Tokenizer` with losses: `to_tokenizer()` hands the trained weights over without copying names.
Peculiar: as released the frozen Q-Former stays in train mode, so its dropout makes codes and targets noisy
(`frozen_dropout=False` stops that). Unused codes receive no gradient but are weight-decayed if the optimiser does so.
Ours, off by default: training the Q-Former too, corrupted codes, a read-out loss, and no quantiser (warm-up).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.tokenizers.seed2 import Seed2Tokenizer
from seed_multimodal.tokenizers.seed2_config import Seed2Config
from seed_multimodal.weights import LoadReport, assign_strictly

ENCODER_PARTS = ("visual_encoder", "ln_vision", "Qformer", "query_tokens")


@dataclass(frozen=True)
class Stage2Weights:
    """Factor of each loss term; `readout` multiplies the read-out loss if a read-out matrix is given."""

    embed: float = 5.0
    recon_s: float = 2.0
    distil_image: float = 0.5
    readout: float = 1.0


@dataclass
class Stage2Output:
    """Weighted losses `[]` that add up to `loss`, and the activations they came from.

    `loss_embed_raw` is unweighted. `indices` is None when the quantiser was bypassed.
    """

    loss: Tensor
    loss_embed: Tensor
    loss_recon_s: Tensor
    loss_distil_image: Tensor
    loss_readout: Tensor
    loss_embed_raw: Tensor
    indices: Tensor | None
    pre_quant: Tensor
    quant: Tensor
    query_output: Tensor
    query_up: Tensor
    recon_s: Tensor | None
    image_tokens: Tensor
    image_embeds: Tensor
    target: Tensor


class Stage2Model(Seed2Tokenizer):
    """Codebook training.

    Args:
        config: sizes; the published training code used `use_qformer_image=True, reverse_depth=4`.
        weights: factors of the loss terms.
        clip_model: frozen model whose output's `.image_embeds` is the target when `forward` gets none.
        freeze_qformer: False trains `Qformer`, `query_tokens` and `ln_vision` too (the vision tower never).
        frozen_dropout: leave the frozen Q-Former in train mode, as released.
        corrupt: each sample gets a fraction of its codes, uniform in [0, corrupt], replaced by random ones before
            decoding (training mode only), so that the decoder survives a language model's errors.
        nested: probability that a sample is decoded from its first k codes only, k uniform (training mode only), so
            that early codes carry the most; the places after them hold zeros.
        readout_weight: `W` `[M, E]`; adds `mse(W ê, W e)`, for example a read-out of VAE latents.
        ema_decay: moving-average codebook instead of the codebook loss.
    """

    readout_weight: Tensor | None

    def __init__(self, config: Seed2Config, *, weights: Stage2Weights | None = None,
                 clip_model: nn.Module | None = None, freeze_qformer: bool = True, frozen_dropout: bool = True,
                 corrupt: float = 0.0, nested: float = 0.0,
                 readout_weight: Tensor | None = None, ema_decay: float | None = None) -> None:
        super().__init__(config, ema_decay=ema_decay)
        if not 0.0 <= corrupt <= 1.0:
            raise ConfigError(f"corrupt must be a probability between 0 and 1, got {corrupt}.")
        self.weights, self.corrupt, self.nested = weights or Stage2Weights(), corrupt, nested
        self.freeze_qformer, self.frozen_dropout = freeze_qformer, frozen_dropout
        self.register_buffer("readout_weight", readout_weight, persistent=False)
        self.clip_model = clip_model
        for part in self._frozen_parts():
            part.requires_grad_(False)
        self.train()

    def _frozen_parts(self) -> list[nn.Module | nn.Parameter]:
        parts: list[nn.Module | nn.Parameter] = [self.visual_encoder]
        if self.clip_model is not None:
            parts.append(self.clip_model)
        if self.freeze_qformer:
            parts += [self.ln_vision, self.Qformer, self.query_tokens]
        return parts

    def train(self, mode: bool = True) -> Stage2Model:
        """As usual, except that the vision tower, and a frozen Q-Former if asked for, stay in eval mode."""
        super().train(mode)
        self.visual_encoder.eval()
        if self.freeze_qformer and not self.frozen_dropout:
            self.Qformer.eval()
        return self

    def encoder_output(self, images: Tensor | None, vit_features: Tensor | None = None) -> Tensor:
        """Pixels, or tower output `[B, N, W]` before `ln_vision`, → Q-Former output `[B, 32, D]`."""
        with torch.no_grad():
            vit = self.visual_encoder(images) if vit_features is None else vit_features
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_qformer):
            return self.query_features_from(self.ln_vision(vit))

    def forward(self, images: Tensor | None, target: Tensor | None = None, *, vit_features: Tensor | None = None,
                query_features: Tensor | None = None, quantize: bool = True,
                generator: torch.Generator | None = None) -> Stage2Output:
        """Losses of a batch.

        Args:
            images: normalised pixels `[B, 3, S, S]`; may be None with `vit_features` `[B, N, W]` (before
                `ln_vision`) or `query_features` `[B, 32, D]`.
            target: image embeddings `[B, E]`; computed by `clip_model` from `images` if None.
            quantize: False decodes the features themselves (warm-up before `quantize.init_from`).
            generator: draws the code corruption.
        """
        if query_features is None:
            query_features = self.encoder_output(images, vit_features)
        target = self._target(images, target)
        pre_quant = self.pre_quant_from_features(query_features)
        if quantize:
            quant, embed_raw, indices = self.quantize(pre_quant)
            quant = self._prefix(self._corrupt(quant, generator), generator)
        else:
            quant, embed_raw, indices = self.quantize.prepare(pre_quant), pre_quant.new_zeros(()), None
        query_up = self.upsample(quant)
        recon_s = self.rebuild_queries(query_up) if self.config.recon_s else None
        image_tokens = self.image_tokens(query_up)
        image_embeds = self.project_image(image_tokens)
        factors = self.weights
        loss_embed = factors.embed * embed_raw
        loss_recon = query_up.new_zeros(())
        if recon_s is not None:
            loss_recon = factors.recon_s * (1 - _cosine(recon_s, query_features.detach())).mean()
        loss_image = factors.distil_image * F.mse_loss(image_embeds.float(), target.float())
        loss_readout = self._readout(image_embeds, target)
        loss = loss_embed + loss_recon + loss_image + loss_readout
        return Stage2Output(loss, loss_embed, loss_recon, loss_image, loss_readout, embed_raw, indices, pre_quant,
                            quant, query_features, query_up, recon_s, image_tokens, image_embeds, target)

    def _target(self, images: Tensor | None, target: Tensor | None) -> Tensor:
        if target is not None:
            return target
        if self.clip_model is None or images is None:
            raise ConfigError("Stage 2 needs a target image embedding: give target, or clip_model and images.")
        with torch.no_grad():
            return self.clip_model(images).image_embeds

    def _corrupt(self, quant: Tensor, generator: torch.Generator | None) -> Tensor:
        if not (self.training and self.corrupt):
            return quant
        device = quant.device if generator is None else generator.device
        shape = quant.shape[:2]
        fraction = self.corrupt * torch.rand(shape[0], 1, generator=generator, device=device)
        swap = (torch.rand(shape, generator=generator, device=device) < fraction).to(quant.device)
        codes = torch.randint(self.quantize.size, shape, generator=generator, device=device).to(quant.device)
        return torch.where(swap[..., None], self.quantize.lookup(codes).detach().to(quant.dtype), quant)

    def _prefix(self, quant: Tensor, generator: torch.Generator | None) -> Tensor:
        if not (self.training and self.nested):
            return quant
        count, places = quant.shape[:2]
        device = quant.device if generator is None else generator.device
        keep = torch.randint(1, places + 1, (count, 1), generator=generator, device=device)
        whole = torch.rand(count, 1, generator=generator, device=device) >= self.nested
        shown = whole | (torch.arange(places, device=device) < keep)
        return quant * shown.to(quant)[..., None]

    def _readout(self, image_embeds: Tensor, target: Tensor) -> Tensor:
        if self.readout_weight is None:
            return image_embeds.new_zeros(())
        error = (image_embeds.float() - target.float()) @ self.readout_weight.float().T
        return self.weights.readout * error.square().mean()

    def load_stage1(self, state: Mapping[str, Tensor], source: str = "the stage-1 model") -> LoadReport:
        """Take the encoder side by name from a stage-1 state dict (text path and projections are left behind).

        A training checkpoint without the frozen vision tower is accepted: load the tower separately.
        """
        own = self.state_dict()
        state = {name: value for name, value in state.items() if name in own and name.split(".")[0] in ENCODER_PARTS}
        rest = [name for name in own if name.split(".")[0] not in ENCODER_PARTS]
        tower = [name for name in own if name.startswith("visual_encoder.")]
        has_tower = any(name in state for name in tower)
        return assign_strictly(self, state, source, allow_missing=rest if has_tower else rest + tower)

    def to_tokenizer(self) -> Seed2Tokenizer:
        """The trained tokenizer in eval mode; its tensors are this model's own, not copies."""
        with torch.device("meta"):
            tokenizer = Seed2Tokenizer(self.config)
        wanted = tokenizer.state_dict()
        tokenizer.load_state_dict({name: value for name, value in self.state_dict().items() if name in wanted},
                                  assign=True)
        tokenizer.quantize.counts = torch.zeros_like(self.quantize.counts)  # not saved, so still without memory
        return tokenizer.requires_grad_(False).eval()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine along the last axis without an epsilon, as released: `[..., D]` → `[...]`."""
    a, b = a.float(), b.float()
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
