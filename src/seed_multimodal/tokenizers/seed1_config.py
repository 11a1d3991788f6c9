"""Sizes of a SEED-1 tokenizer: the defaults are the released model, anything smaller is the same code.

Written as `config.json` beside our weights; `infer` reads the sizes off a checkpoint of released width without one.
What the original decided by magic numbers stands here: the Q-Former is causal at `qformer.causal_queries` queries, the
Reverse Q-Former never is, and its depth is `reverse_depth`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.tokenizers.sizes import Shapes, TokenizerConfig, count_layers
from seed_multimodal.vision.eva import EvaConfig

MODEL_TYPE = "seed1_tokenizer"
REVERSE_LAYERS = "Reverse_Qformer.bert.encoder.layer"


@dataclass(frozen=True)
class Seed1Config(TokenizerConfig):
    """All sizes: `text_tokens` embeddings of `text_features_dim` come out (77 of 768: what SD 1's text encoder gives).

    `normalize_codes` and `codebook_sections` are ours, as in `Seed2Config`: codes on the unit sphere (released: off),
    a part of the codebook for each position (released: 1, all from all).
    """

    model_type: ClassVar[str] = MODEL_TYPE
    name: ClassVar[str] = "SEED-1"

    vit: EvaConfig = field(default_factory=EvaConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    num_query: int = 32
    codebook_size: int = 8192
    codebook_dim: int = 32
    decode_depth: int = 4
    decode_heads: int = 12
    reverse_depth: int = 4
    text_tokens: int = 77
    text_features_dim: int = 768
    normalize_codes: bool = False
    codebook_sections: int = 1

    @property
    def reverse_qformer(self) -> QFormerConfig:
        """The Reverse Q-Former: as the Q-Former, but shallower and with full attention among its queries."""
        return dataclasses.replace(self.qformer, depth=self.reverse_depth, causal_queries=0)

    @classmethod
    def infer(cls, state: Mapping[str, Tensor], source: str | Path) -> Seed1Config:
        """Sizes from the shapes in a flat checkpoint that holds `visual_encoder.*` too.

        Raises:
            CheckpointError: a tensor that shows a size is missing, or a width is not the released one (weights do not
                show the number of attention heads).
        """
        shape = Shapes(state, source, cls)
        codebook = shape("quantize.embedding.weight")
        return cls(vit=shape.vit(), qformer=shape.qformer(), num_query=shape("query_tokens")[1],
                   codebook_size=codebook[0], codebook_dim=codebook[1], decode_depth=count_layers(state, "blocks_text"),
                   reverse_depth=count_layers(state, REVERSE_LAYERS), text_tokens=shape("reverse_tokens")[1],
                   text_features_dim=shape("distill_text_proj.weight")[0])
