"""SEED-2's stage 2: a codebook between the frozen Q-Former and two decoders, to its queries and to an image embedding.

The decode side's loss is 0.5 · MSE to the target image embedding; the rest is `stage2_base`'s. Ours, off by default: a
read-out loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import setting
from seed_multimodal.tokenizers.seed2 import Seed2Config, Seed2Tokenizer
from seed_multimodal.tokenizers.stage2_base import CodebookOutput, CodebookWeights, Stage2Base


@dataclass(frozen=True)
class Stage2Weights(CodebookWeights):
    """Factor of each loss term; `readout` multiplies the read-out loss if a read-out matrix is given."""

    distil_image: float = setting(0.5, least=0)
    readout: float = setting(1.0, least=0)


@dataclass(kw_only=True)
class Stage2Output(CodebookOutput):
    """The image branch's losses `[]` and activations beside the shared ones."""

    loss_distil_image: Tensor
    loss_readout: Tensor
    image_tokens: Tensor
    image_embeds: Tensor


class Stage2Model(Stage2Base, Seed2Tokenizer):
    """Codebook training.

    Args:
        config: sizes; the published training code used `use_qformer_image=True, reverse_depth=4`.
        weights: factors of the loss terms.
        clip_model: frozen model whose output's `.image_embeds` is the target when `forward` gets none.
        freeze_qformer, frozen_dropout, corrupt, nested: see `Stage2Base.start_training`.
        readout_weight: `W` `[M, E]`; adds `mse(W ê, W e)`, for example a read-out of VAE latents.
        ema_decay: moving-average codebook instead of the codebook loss.
    """

    tokenizer_class, output_class, target_tower = Seed2Tokenizer, Stage2Output, "clip_model"
    weights: Stage2Weights
    readout_weight: Tensor | None

    def __init__(self, config: Seed2Config, *, weights: Stage2Weights | None = None,
                 clip_model: nn.Module | None = None, freeze_qformer: bool = True, frozen_dropout: bool = True,
                 corrupt: float = 0.0, nested: float = 0.0,
                 readout_weight: Tensor | None = None, ema_decay: float | None = None) -> None:
        super().__init__(config, ema_decay=ema_decay)
        self.weights = weights or Stage2Weights()
        self.register_buffer("readout_weight", readout_weight, persistent=False)
        self.clip_model = clip_model
        self.start_training(freeze_qformer=freeze_qformer, frozen_dropout=frozen_dropout, corrupt=corrupt,
                            nested=nested)

    @torch.no_grad()
    def scale_start(self) -> None:
        """Random weights around the codebook and in the decode head that keep the size of what goes through them.

        PyTorch's, as released, shrink it at each of these layers: then hundreds of steps go by before codes matter.
        """
        for part in (self.encode_task_layer, self.decode_task_layer, getattr(self, "image_down", ())):
            followed = 2.0 if part is getattr(self, "image_down", None) else 1.0  # ReLU lets half of it through
            for layer in part:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=(followed / layer.in_features) ** 0.5)
        nn.init.normal_(self.distill_image_proj.weight, std=0.3 * self.distill_image_proj.in_features ** -0.5)
        nn.init.normal_(self.pos_embed_image, std=0.5)

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
        return self.through_codes(query_features, self._target(images, target), quantize, generator)

    def distil(self, query_up: Tensor, target: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Upsampled codes `[B, 32, D]` → distillation and read-out loss; the image branch's activations."""
        tokens = self.image_tokens(query_up)
        embeds = self.project_image(tokens)
        losses = {"loss_distil_image": self.weights.distil_image * F.mse_loss(embeds.float(), target.float()),
                  "loss_readout": self._readout(embeds, target)}
        return losses, {"image_tokens": tokens, "image_embeds": embeds}

    def _target(self, images: Tensor | None, target: Tensor | None) -> Tensor:
        if target is not None:
            return target
        if self.clip_model is None or images is None:
            raise ConfigError("Stage 2 needs a target image embedding: give target, or clip_model and images.")
        with torch.no_grad():
            return self.clip_model(images).image_embeds

    def _readout(self, image_embeds: Tensor, target: Tensor) -> Tensor:
        if self.readout_weight is None:
            return image_embeds.new_zeros(())
        error = (image_embeds.float() - target.float()) @ self.readout_weight.float().T
        return self.weights.readout * error.square().mean()
