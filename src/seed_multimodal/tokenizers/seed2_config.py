"""Sizes of a SEED-2 tokenizer: the defaults are the released model, anything smaller is the same code.

Written as `config.json` beside our weights; `infer` reads the sizes off a checkpoint without one, except the numbers
of attention heads, which no tensor shows: those are known for the released widths only.
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

MODEL_TYPE = "seed2_tokenizer"


@dataclass(frozen=True)
class Seed2Config(TokenizerConfig):
    """All sizes; `use_qformer_image` picks the decode head (False: `image_down`, True: Reverse Q-Former).

    `recon_s`: keep `pos_embed`/`blocks`, which only stage 2's reconstruction loss uses (released: kept).
    `normalize_codes` and `codebook_sections` are ours: codes compared and decoded on the unit sphere (released: off);
    each of the `num_query` positions chooses from its own part of the codebook (released: 1, all from all).
    """

    model_type: ClassVar[str] = MODEL_TYPE
    name: ClassVar[str] = "SEED-2"

    vit: EvaConfig = field(default_factory=EvaConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    num_query: int = 32
    codebook_size: int = 8192
    codebook_dim: int = 32
    decode_depth: int = 4
    decode_heads: int = 12
    image_features_dim: int = 1024
    use_qformer_image: bool = False
    reverse_depth: int = 12
    recon_s: bool = True
    normalize_codes: bool = False
    codebook_sections: int = 1

    @property
    def reverse_qformer(self) -> QFormerConfig:
        """The Reverse Q-Former differs from the Q-Former in depth only."""
        return dataclasses.replace(self.qformer, depth=self.reverse_depth)

    @classmethod
    def infer(cls, state: Mapping[str, Tensor], source: str | Path) -> Seed2Config:
        """Sizes from the shapes in a flat checkpoint that holds `visual_encoder.*` too.

        `image_down` decides the decode head even when `Reverse_Qformer` keys are present, because the released file
        may carry those of a training-only branch.

        Raises:
            CheckpointError: a tensor that shows a size is missing, or the heads are not known for a width.
        """
        shape = Shapes(state, source, cls)
        reverse = "image_down.0.weight" not in state
        codebook = shape("quantize.embedding.weight")
        return cls(
            vit=shape.vit(), qformer=shape.qformer(), num_query=shape("query_tokens")[1],
            codebook_size=codebook[0], codebook_dim=codebook[1], decode_depth=count_layers(state, "blocks_image"),
            recon_s=count_layers(state, "blocks") > 0, use_qformer_image=reverse,
            image_features_dim=shape("distill_image_proj.weight")[0],
            reverse_depth=count_layers(state, "Reverse_Qformer.bert.encoder.layer") if reverse else cls.reverse_depth)
