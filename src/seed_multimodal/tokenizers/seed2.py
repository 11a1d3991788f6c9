"""SEED-2: an image becomes 32 codes of a codebook, and 32 codes become one image embedding.

    images ─► … ─► codes, as in `encoder.CodeTokenizer`
    codes ─► quantize rows ─► decode_task_layer ─► + pos_embed_image ─► blocks_image ─► head ─► image embedding

The head is `image_down` + flatten (released weights) or the Reverse Q-Former (published training code).
`pos_embed`/`blocks` rebuild the Q-Former's output: a training objective, unused at inference, part of the checkpoint.
Peculiar: code k depends on queries 0..k only (causal); the embedding is not normalised.
Attribute names are the released ones, so the state dict is the released 881 (Reverse Q-Former: 1134) keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.tokenizers.encoder import CodeTokenizer, chunked, evaluating
from seed_multimodal.tokenizers.layers import Block, run_blocks
from seed_multimodal.tokenizers.qformer import QFormer, QFormerConfig
from seed_multimodal.tokenizers.tokenizer_config import Shapes, TokenizerConfig, count_layers
from seed_multimodal.vision.eva import EvaConfig

DOWN_WIDTHS = (256, 128, 32)
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


class Seed2Tokenizer(CodeTokenizer):
    """Encoder, codebook and decoder; sizes from `config`. Construct, or load with `from_pretrained`."""

    config: Seed2Config

    def __init__(self, config: Seed2Config, *, ema_decay: float | None = None) -> None:
        super().__init__()
        width = config.qformer.width
        self.config = config
        self.load_report = None
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query, width).normal_(std=0.02))
        if config.recon_s:
            self.pos_embed = nn.Parameter(torch.zeros(1, config.num_query, width))
        self.pos_embed_image = nn.Parameter(torch.zeros(1, config.num_query, width))
        if config.use_qformer_image:
            self.reverse_tokens = nn.Parameter(torch.zeros(1, 1, width).normal_(std=0.02))
        self.add_encoder(ema_decay)
        if config.recon_s:
            self.blocks = nn.ModuleList(Block(width, config.decode_heads) for _ in range(config.decode_depth))
        self.blocks_image = nn.ModuleList(Block(width, config.decode_heads) for _ in range(config.decode_depth))
        if config.use_qformer_image:
            self.Reverse_Qformer = QFormer(config.reverse_qformer, width)
            self.distill_image_proj = nn.Linear(width, config.image_features_dim)
        else:
            self.image_down = _image_down(width)
            self.distill_image_proj = nn.Linear(config.num_query * DOWN_WIDTHS[-1], config.image_features_dim)

    # ---- codes → embedding

    @torch.no_grad()
    def decode(self, codes: Tensor | Sequence, *, batch_size: int | None = None) -> Tensor:
        """Codes `[B, 32]` (or one row of 32) → image embeddings `[B, image_features_dim]`.

        Raises:
            CodesError: wrong number of codes, or one outside the codebook.
        """
        codes = self.check_codes(codes)
        with evaluating(self):
            return chunked(lambda part: self.decode_embedding(self.quantize.lookup(part)), codes, batch_size,
                           torch.empty(0, self.config.image_features_dim, device=self.device, dtype=self.dtype))

    def rebuild_queries(self, up_BQD: Tensor) -> Tensor:
        """`upsample`d codes → the Q-Former output they stand for `[B, 32, D]` (training objective).

        Raises:
            ConfigError: a model built with `recon_s=False` has no such blocks.
        """
        if not self.config.recon_s:
            raise ConfigError("This tokenizer was built with recon_s=False: it has no blocks that rebuild the queries.")
        return run_blocks(up_BQD + self.pos_embed, self.blocks)

    def image_tokens(self, up_BQD: Tensor) -> Tensor:
        """`upsample`d codes → output of `blocks_image` `[B, 32, D]`."""
        return run_blocks(up_BQD + self.pos_embed_image, self.blocks_image)

    def project_image(self, tokens_BQD: Tensor) -> Tensor:
        """Output of `blocks_image` → image embedding `[B, image_features_dim]`, not normalised."""
        if self.config.use_qformer_image:
            reverse = self.Reverse_Qformer(self.reverse_tokens.expand(len(tokens_BQD), -1, -1), tokens_BQD)
            return self.distill_image_proj(reverse).squeeze(1)
        return self.distill_image_proj(self.image_down(tokens_BQD).flatten(1))

    def decode_embedding(self, quant_BQd: Tensor) -> Tensor:
        """Codebook rows (or straight-through codes) `[B, 32, d]` → image embedding, with gradients."""
        return self.project_image(self.image_tokens(self.upsample(quant_BQd)))

    @classmethod
    def from_pretrained(cls, source: str | Path, *, vision: str | Path | None = None,
                        config: Seed2Config | None = None, image_size: int | None = None,
                        device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
                        log: Callable[[str], None] | None = None) -> Seed2Tokenizer:
        """Load our folder, the released layout or a single file, in eval mode; see `checkpoints.load_tokenizer`."""
        from seed_multimodal.tokenizers.checkpoints import load_tokenizer

        return load_tokenizer(source, vision=vision, config=config, image_size=image_size, device=device,
                              dtype=dtype, log=log)


def _image_down(width: int) -> nn.Sequential:
    first, second, last = DOWN_WIDTHS
    return nn.Sequential(nn.Linear(width, first, bias=False), nn.ReLU(), nn.Linear(first, second, bias=False),
                         nn.ReLU(), nn.Linear(second, last, bias=False))
