"""SEED-1: an image becomes 32 codes, and 32 codes become 77 embeddings in the place of Stable Diffusion's text.

    images ─► … ─► codes, as in `encoder.CodeTokenizer`
    codes ─► quantize rows ─► decode_task_layer ─► + pos_embed_text ─► blocks_text
          ─► Reverse_Qformer(reverse_tokens) ─► distill_text_proj ─► embeddings [77, 768]

The encode side is SEED-2's, the decode side another one (SEED-2 ends in one image embedding).
Note: code k depends on queries 0..k only (causal); the 77 reverse queries see each other freely.
Attribute names are the released ones, so the state dict is the released 917 keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seed_multimodal.settings import setting
from seed_multimodal.tokenizers.encoder import CodeTokenizer, decode_blocks, run_blocks
from seed_multimodal.tokenizers.qformer import QFormer, QFormerConfig
from seed_multimodal.tokenizers.released import IMAGE_BRANCH, REBUILDING, SEED1, TRAINING_ONLY
from seed_multimodal.tokenizers.tokenizer_config import REVERSE_LAYERS, Shapes, TokenizerConfig

# The training code's names of the text branch → the released ones.
TEXT_NAMES = {"Reverse_Qformer_text.": "Reverse_Qformer.", "reverse_tokens_text": "reverse_tokens"}


@dataclass(frozen=True)
class Seed1Config(TokenizerConfig):
    """All sizes: `text_tokens` embeddings of `text_features_dim` come out (77 of 768: what SD 1's text encoder gives).

    What the original decided by magic numbers stands here: the Q-Former is causal at `qformer.causal_queries` queries,
    the Reverse Q-Former never is, and its depth is `reverse_depth`.
    """

    model_type: ClassVar[str] = "seed1_tokenizer"
    name: ClassVar[str] = SEED1.name

    text_tokens: int = setting(77, least=1)
    text_features_dim: int = setting(768, least=1)

    @property
    def reverse_qformer(self) -> QFormerConfig:
        """The Reverse Q-Former: as the Q-Former, but shallower and with full attention among its queries."""
        return dataclasses.replace(self.qformer, depth=self.reverse_depth, causal_queries=0)

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        """One embedding per text token."""
        return (self.text_tokens, self.text_features_dim)

    @classmethod
    def decoder_sizes(cls, shape: Shapes) -> dict[str, Any]:
        """Sizes of the text decoder."""
        return {"decode_depth": shape.layers("blocks_text"), "reverse_depth": shape.layers(REVERSE_LAYERS),
                "text_tokens": shape("reverse_tokens")[1], "text_features_dim": shape("distill_text_proj.weight")[0]}


class Seed1Tokenizer(CodeTokenizer):
    """Encoder, codebook and decoder; sizes from `config`. Construct, or load with `from_pretrained`."""

    layout, config_class = SEED1, Seed1Config
    config: Seed1Config

    def __init__(self, config: Seed1Config, *, ema_decay: float | None = None) -> None:
        super().__init__()
        width = config.qformer.width
        self.config = config
        self.load_report = None
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query, width).normal_(std=0.02))
        self.pos_embed_text = nn.Parameter(torch.zeros(1, config.num_query, width))
        self.reverse_tokens = nn.Parameter(torch.zeros(1, config.text_tokens, width).normal_(std=0.02))
        self.add_encoder(ema_decay)
        self.blocks_text = decode_blocks(config)
        self.Reverse_Qformer = QFormer(config.reverse_qformer, width)
        self.distill_text_proj = nn.Linear(width, config.text_features_dim)

    def predict(self, images: Tensor, *, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """The original's one method: images `[B, 3, S, S]` → (codes `[B, 32]`, embeddings of those codes).

        Raises:
            ImageError: not a floating tensor of that shape and size.
        """
        codes = self.encode(images, batch_size=batch_size)
        return codes, self.decode(codes, batch_size=batch_size)

    def text_blocks(self, up_BQD: Tensor) -> Tensor:
        """`upsample`d codes → output of `blocks_text` `[B, 32, D]`."""
        return run_blocks(up_BQD + self.pos_embed_text, self.blocks_text)

    def reverse_queries(self, tokens_BQD: Tensor) -> Tensor:
        """Output of `blocks_text` → what the Reverse Q-Former's queries read from it `[B, text_tokens, D]`."""
        return self.Reverse_Qformer(self.reverse_tokens.expand(len(tokens_BQD), -1, -1), tokens_BQD)

    def decode_embeddings(self, quant_BQd: Tensor) -> Tensor:
        """Codebook rows (or straight-through codes) `[B, 32, d]` → embeddings, with gradients."""
        return self.distill_text_proj(self.reverse_queries(self.text_blocks(self.upsample(quant_BQd))))

    @classmethod
    def ignored_names(cls, config: Seed1Config) -> Sequence[str]:
        """Training-only names, the image branch's among them."""
        return (*TRAINING_ONLY, *IMAGE_BRANCH, *REBUILDING)

    @classmethod
    def released_names(cls, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The published training code's names → the released ones, and the names left out.

        That code holds this decoder as its text branch (`_text`) beside SEED-2's image branch; with a text branch
        present, unsuffixed `Reverse_Qformer`/`reverse_tokens` belong to the image branch.
        """
        if not any(name.startswith(tuple(TEXT_NAMES)) for name in state):
            return dict(state), []
        renamed, left_out = {}, []
        for name, value in state.items():
            own = next((prefix for prefix in TEXT_NAMES if name.startswith(prefix)), None)
            if own is not None:
                renamed[TEXT_NAMES[own] + name.removeprefix(own)] = value
            elif name.startswith(tuple(TEXT_NAMES.values())):
                left_out.append(name)
            else:
                renamed[name] = value
        return renamed, left_out
