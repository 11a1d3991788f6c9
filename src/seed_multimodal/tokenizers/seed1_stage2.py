"""SEED-1's stage 2: codes between the frozen Q-Former and two decoders, one back to its queries, one to text features.

Loss = 5 · codebook + 2 · (1 - cosine to the Q-Former's output) + 0.5 · MSE to the text features of the caption, the
77 x 768 states that Stable Diffusion 1 is conditioned on. SEED-1's own training code was never published; this is the
text branch that its successor's code still holds, with that code's weights.
The model is a `Seed1Tokenizer` with losses and the blocks that rebuild the queries (`pos_embed`, `blocks`: training
only): `to_tokenizer()` hands the trained weights over. What is frozen, dropout, corrupted codes and the warm-up are
`codebook_training`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.tokenizers.codebook_training import CodebookOutput, CodebookTraining, CodebookWeights
from seed_multimodal.tokenizers.encoder import ENCODER_PARTS
from seed_multimodal.tokenizers.layers import Block, run_blocks
from seed_multimodal.tokenizers.seed1 import Seed1Config, Seed1Tokenizer
from seed_multimodal.tokenizers.seed1_loading import IGNORED, rename_training
from seed_multimodal.weights import LoadReport, assign_strictly

RECON_PARTS = ("pos_embed", "blocks")


@dataclass(frozen=True)
class Seed1Stage2Weights(CodebookWeights):
    """Factor of each loss term."""

    distil_text: float = 0.5


@dataclass(kw_only=True)
class Seed1Stage2Output(CodebookOutput):
    """The text branch's loss `[]` and activations beside the shared ones."""

    loss_distil_text: Tensor
    text_tokens: Tensor
    text_embeds: Tensor


class Seed1Stage2Model(CodebookTraining, Seed1Tokenizer):
    """Codebook training towards text features.

    Args:
        config: sizes.
        weights: factors of the loss terms.
        text_encoder: frozen `CLIPTextModel` (Stable Diffusion's) whose `last_hidden_state` of the caption is the
            target when `forward` gets none.
        freeze_qformer, frozen_dropout, corrupt, nested: see `CodebookTraining.start_training`.
        ema_decay: moving-average codebook instead of the codebook loss.

    Raises:
        ConfigError: a probability outside 0..1, or a text encoder of another width.
    """

    tokenizer_class = Seed1Tokenizer
    target_tower = "text_encoder"
    weights: Seed1Stage2Weights

    def __init__(self, config: Seed1Config, *, weights: Seed1Stage2Weights | None = None,
                 text_encoder: nn.Module | None = None, freeze_qformer: bool = True, frozen_dropout: bool = True,
                 corrupt: float = 0.0, nested: float = 0.0, ema_decay: float | None = None) -> None:
        super().__init__(config, ema_decay=ema_decay)
        width = config.qformer.width
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_query, width))
        self.blocks = nn.ModuleList(Block(width, config.decode_heads) for _ in range(config.decode_depth))
        self.weights = weights or Seed1Stage2Weights()
        self.text_encoder = text_encoder
        if text_encoder is not None and text_encoder.config.hidden_size != config.text_features_dim:
            raise ConfigError(f"The text encoder's features are {text_encoder.config.hidden_size} wide, the "
                              f"tokenizer's embeddings {config.text_features_dim}: they do not belong together.")
        self.start_training(freeze_qformer=freeze_qformer, frozen_dropout=frozen_dropout, corrupt=corrupt,
                            nested=nested)

    def train(self, mode: bool = True) -> Self:
        """As the base class; the text encoder stays in eval mode too."""
        super().train(mode)
        if self.text_encoder is not None:
            self.text_encoder.eval()
        return self

    def rebuild_queries(self, up_BQD: Tensor) -> Tensor:
        """`upsample`d codes → the Q-Former output they stand for `[B, 32, D]` (training objective)."""
        return run_blocks(up_BQD + self.pos_embed, self.blocks)

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
        self._check_target(target, len(query_features))
        coded = self.through_codes(query_features, quantize, generator)
        recon_s = self.rebuild_queries(coded.query_up)
        text_tokens = self.text_blocks(coded.query_up)
        text_embeds = self.distill_text_proj(self.reverse_queries(text_tokens))
        losses = {"loss_distil_text": self.weights.distil_text * F.mse_loss(text_embeds.float(), target.float())}
        return self.output(Seed1Stage2Output, coded, recon_s, target, losses, text_tokens=text_tokens,
                           text_embeds=text_embeds)

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

    def _check_target(self, target: Tensor, count: int) -> None:
        wanted = [count, self.config.text_tokens, self.config.text_features_dim]
        if list(target.shape) != wanted:
            raise ConfigError(f"The target text features must be {wanted}, got {list(target.shape)}.")

    def load_training(self, state: Mapping[str, Tensor], source: str = "the stage-2 checkpoint") -> LoadReport:
        """Go on from a stage-2 checkpoint, ours or the published training code's (text branch, `_text` names).

        What training freezes (tower, Q-Former) may be missing and stays as it is; a whole encoder is taken too.

        Raises:
            CheckpointError: anything of the decode side missing, or tensors that belong to neither.
        """
        renamed, left_out = rename_training(state)
        own = self.state_dict()
        frozen = [name for name in own if name.split(".")[0] in (*ENCODER_PARTS, "text_encoder")]
        ignored = [pattern for pattern in IGNORED if pattern.split(".")[0] not in RECON_PARTS]
        report = assign_strictly(self, renamed, source, allow_missing=frozen, allow_unexpected=ignored)
        report.ignored += left_out
        return report
