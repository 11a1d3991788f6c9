"""SEED-1: an image becomes 32 codes, and 32 codes become 77 embeddings in the place of Stable Diffusion's text.

    images ─► … ─► codes, as in `encoder.CodeTokenizer`
    codes ─► quantize rows ─► decode_task_layer ─► + pos_embed_text ─► blocks_text
          ─► Reverse_Qformer(reverse_tokens) ─► distill_text_proj ─► embeddings [77, 768]

The encode side is SEED-2's, the decode side another one (SEED-2 ends in one image embedding).
Peculiar: code k depends on queries 0..k only (causal); the 77 reverse queries see each other freely.
Attribute names are the released ones, so the state dict is the released 917 keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from seed_multimodal.tokenizers.encoder import CodeTokenizer, chunked, evaluating
from seed_multimodal.tokenizers.layers import Block, run_blocks
from seed_multimodal.tokenizers.qformer import QFormer, QFormerConfig
from seed_multimodal.tokenizers.tokenizer_config import Shapes, TokenizerConfig, count_layers
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


class Seed1Tokenizer(CodeTokenizer):
    """Encoder, codebook and decoder; sizes from `config`. Construct, or load with `from_pretrained`."""

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
        self.blocks_text = nn.ModuleList(Block(width, config.decode_heads) for _ in range(config.decode_depth))
        self.Reverse_Qformer = QFormer(config.reverse_qformer, width)
        self.distill_text_proj = nn.Linear(width, config.text_features_dim)

    @torch.no_grad()
    def decode(self, codes: Tensor | Sequence, *, batch_size: int | None = None) -> Tensor:
        """Codes `[B, 32]` (or one row of 32) → embeddings `[B, text_tokens, text_features_dim]`.

        Raises:
            CodesError: wrong number of codes, or one outside the codebook.
        """
        codes = self.check_codes(codes)
        with evaluating(self):
            return chunked(lambda part: self.decode_embeddings(self.quantize.lookup(part)), codes, batch_size,
                           torch.empty(0, self.config.text_tokens, self.config.text_features_dim, device=self.device,
                                       dtype=self.dtype))

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
    def from_pretrained(cls, source: str | Path, *, vision: str | Path | None = None,
                        config: Seed1Config | None = None, image_size: int | None = None,
                        device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
                        log: Callable[[str], None] | None = None) -> Seed1Tokenizer:
        """Load our folder or the released layout, in eval mode; see `seed1_loading.load_seed1`."""
        from seed_multimodal.tokenizers.seed1_loading import load_seed1

        return load_seed1(source, vision=vision, config=config, image_size=image_size, device=device, dtype=dtype,
                          log=log)
