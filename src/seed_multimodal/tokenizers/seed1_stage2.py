"""SEED-1's stage 2: codes between the frozen Q-Former and two decoders, one back to its queries, one to text features.

The decode side's loss is 0.5 · MSE to the text features of the caption, the 77 x 768 states that Stable Diffusion 1 is
conditioned on; the rest is `stage2_base`'s. SEED-1's own training code was never published; this is the text branch in
its successor's code, with that code's weights. The blocks that rebuild the queries (`pos_embed`, `blocks`) exist in
training only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import setting
from seed_multimodal.tokenizers.encoder import decode_blocks
from seed_multimodal.tokenizers.seed1 import Seed1Config, Seed1Tokenizer
from seed_multimodal.tokenizers.stage2_base import CodebookOutput, CodebookWeights, Stage2Base


@dataclass(frozen=True)
class Seed1Stage2Weights(CodebookWeights):
    """Factor of each loss term."""

    distil_text: float = setting(0.5, least=0)


@dataclass(kw_only=True)
class Seed1Stage2Output(CodebookOutput):
    """The text branch's loss `[]` and activations beside the shared ones."""

    loss_distil_text: Tensor
    text_tokens: Tensor
    text_embeds: Tensor


class Seed1Stage2Model(Stage2Base, Seed1Tokenizer):
    """Codebook training with text features as the target.

    Args:
        config: sizes.
        weights: factors of the loss terms.
        text_encoder: frozen `CLIPTextModel` (Stable Diffusion's) whose `last_hidden_state` of the caption is the
            target when `forward` gets none.
        freeze_qformer, frozen_dropout, corrupt, nested: see `Stage2Base.start_training`.
        ema_decay: moving-average codebook instead of the codebook loss.

    Raises:
        ConfigError: a probability outside 0..1, or a text encoder of another width.
    """

    tokenizer_class, output_class, target_tower = Seed1Tokenizer, Seed1Stage2Output, "text_encoder"
    weights: Seed1Stage2Weights

    def __init__(self, config: Seed1Config, *, weights: Seed1Stage2Weights | None = None,
                 text_encoder: nn.Module | None = None, freeze_qformer: bool = True, frozen_dropout: bool = True,
                 corrupt: float = 0.0, nested: float = 0.0, ema_decay: float | None = None) -> None:
        super().__init__(config, ema_decay=ema_decay)
        width = config.qformer.width
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_query, width))
        self.blocks = decode_blocks(config)
        self.weights = weights or Seed1Stage2Weights()
        self.text_encoder = text_encoder
        if text_encoder is not None and text_encoder.config.hidden_size != config.text_features_dim:
            raise ConfigError(f"The text encoder's features are {text_encoder.config.hidden_size} wide, the "
                              f"tokenizer's embeddings {config.text_features_dim}: they do not belong together.")
        self.start_training(freeze_qformer=freeze_qformer, frozen_dropout=frozen_dropout, corrupt=corrupt,
                            nested=nested)

    def train(self, mode: bool = True) -> Self:
        """As the base class; the text encoder stays in eval mode too (SEED-2's CLIP does not, as released)."""
        super().train(mode)
        if self.text_encoder is not None:
            self.text_encoder.eval()
        return self

    def forward(self, images: Tensor | None, target: Tensor | None = None, *, input_ids: Tensor | None = None,
                vit_features: Tensor | None = None, query_features: Tensor | None = None, quantize: bool = True,
                generator: torch.Generator | None = None) -> Seed1Stage2Output:
        """Losses of a batch.

        Args:
            images: normalised pixels `[B, 3, S, S]`; may be None with `vit_features` `[B, N, W]` (before
                `ln_vision`) or `query_features` `[B, 32, D]`.
            target: text features of the captions `[B, text_tokens, text_features_dim]`.
            input_ids: captions `[B, text_tokens]` int64 as Stable Diffusion's tokenizer pads them; `text_encoder`
                makes the target of them.
            quantize: False decodes the features themselves (warm-up before `quantize.init_from`).
            generator: draws the code corruption.
        Raises:
            ConfigError: no target, or one of another shape.
        """
        if query_features is None:
            query_features = self.encoder_output(images, vit_features)
        target = self.text_features(input_ids) if target is None else target
        wanted = [len(query_features), *self.config.embedding_shape]
        if list(target.shape) != wanted:
            raise ConfigError(f"The target text features must be {wanted}, got {list(target.shape)}.")
        return self.through_codes(query_features, target, quantize, generator)

    def distil(self, query_up: Tensor, target: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Upsampled codes `[B, 32, D]` → distillation loss; the text branch's activations."""
        tokens = self.text_blocks(query_up)
        embeds = self.distill_text_proj(self.reverse_queries(tokens))
        losses = {"loss_distil_text": self.weights.distil_text * F.mse_loss(embeds.float(), target.float())}
        return losses, {"text_tokens": tokens, "text_embeds": embeds}

    @torch.no_grad()
    def text_features(self, input_ids: Tensor | None) -> Tensor:
        """Padded captions `[B, text_tokens]` int64 → the text encoder's last states; padding is attended, as in SD.

        Raises:
            ConfigError: no captions or no text encoder.
        """
        if self.text_encoder is None or input_ids is None:
            raise ConfigError("Stage 2 of SEED-1 needs target text features: give target, or text_encoder and "
                              "input_ids.")
        return self.text_encoder(input_ids=input_ids).last_hidden_state
