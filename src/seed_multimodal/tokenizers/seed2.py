"""SEED-2: an image becomes 32 codes of a codebook, and 32 codes become one image embedding.

    images ─► … ─► codes, as in `encoder.CodeTokenizer`
    codes ─► quantize rows ─► decode_task_layer ─► + pos_embed_image ─► blocks_image ─► head ─► image embedding

The head is `image_down` + flatten (released weights) or the Reverse Q-Former (published training code).
`pos_embed`/`blocks` rebuild the Q-Former's output: a training objective, unused at inference, part of the checkpoint.
Note: code k depends on queries 0..k only (causal); the embedding is not normalised.
Attribute names are the released ones, so the state dict is the released 881 (Reverse Q-Former: 1134) keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seed_multimodal.settings import setting
from seed_multimodal.tokenizers.encoder import CodeTokenizer, decode_blocks, run_blocks
from seed_multimodal.tokenizers.qformer import QFormer, QFormerConfig
from seed_multimodal.tokenizers.released import REBUILDING, SEED2, TEXT_BRANCH, TRAINING_ONLY
from seed_multimodal.tokenizers.tokenizer_config import REVERSE_LAYERS, Shapes, TokenizerConfig

DOWN_WIDTHS = (256, 128, 32)


@dataclass(frozen=True)
class Seed2Config(TokenizerConfig):
    """All sizes; the defaults are the released model, anything smaller is the same code.

    `use_qformer_image` picks the decode head (False: `image_down`, True: Reverse Q-Former); `recon_s`: keep
    `pos_embed`/`blocks`, which only stage 2's reconstruction loss uses (released: kept).
    """

    model_type: ClassVar[str] = "seed2_tokenizer"
    name: ClassVar[str] = SEED2.name

    reverse_depth: int = setting(12, least=0)
    image_features_dim: int = setting(1024, least=1)
    use_qformer_image: bool = False
    recon_s: bool = True

    @property
    def reverse_qformer(self) -> QFormerConfig:
        """The Reverse Q-Former differs from the Q-Former in depth only."""
        return dataclasses.replace(self.qformer, depth=self.reverse_depth)

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        """One image embedding."""
        return (self.image_features_dim,)

    @classmethod
    def decoder_sizes(cls, shape: Shapes) -> dict[str, Any]:
        """`image_down` decides the decode head even when `Reverse_Qformer` keys are present, because the released file
        may carry those of a training-only branch."""
        reverse = "image_down.0.weight" not in shape.state
        return {"decode_depth": shape.layers("blocks_image"), "recon_s": shape.layers("blocks") > 0,
                "use_qformer_image": reverse, "image_features_dim": shape("distill_image_proj.weight")[0],
                "reverse_depth": shape.layers(REVERSE_LAYERS) if reverse else cls.reverse_depth}


class Seed2Tokenizer(CodeTokenizer):
    """Encoder, codebook and decoder; sizes from `config`. Construct, or load with `from_pretrained`."""

    layout, config_class, progressive = SEED2, Seed2Config, True
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
            self.blocks = decode_blocks(config)
        self.blocks_image = decode_blocks(config)
        if config.use_qformer_image:
            self.Reverse_Qformer = QFormer(config.reverse_qformer, width)
            self.distill_image_proj = nn.Linear(width, config.image_features_dim)
        else:
            self.image_down = _image_down(width)
            self.distill_image_proj = nn.Linear(config.num_query * DOWN_WIDTHS[-1], config.image_features_dim)

    def image_tokens(self, up_BQD: Tensor) -> Tensor:
        """`upsample`d codes → output of `blocks_image` `[B, 32, D]`."""
        return run_blocks(up_BQD + self.pos_embed_image, self.blocks_image)

    def project_image(self, tokens_BQD: Tensor) -> Tensor:
        """Output of `blocks_image` → image embedding `[B, image_features_dim]`, not normalised."""
        if self.config.use_qformer_image:
            reverse = self.Reverse_Qformer(self.reverse_tokens.expand(len(tokens_BQD), -1, -1), tokens_BQD)
            return self.distill_image_proj(reverse).squeeze(1)
        return self.distill_image_proj(self.image_down(tokens_BQD).flatten(1))

    def decode_embeddings(self, quant_BQd: Tensor) -> Tensor:
        """Codebook rows (or straight-through codes) `[B, 32, d]` → image embeddings `[B, E]`, with gradients."""
        return self.project_image(self.image_tokens(self.upsample(quant_BQd)))

    @classmethod
    def ignored_names(cls, config: Seed2Config) -> Sequence[str]:
        """Training-only names, and those of the parts that this configuration does without."""
        image_branch = () if config.use_qformer_image else ("Reverse_Qformer.*", "reverse_tokens")
        return (*TRAINING_ONLY, *TEXT_BRANCH, *image_branch, *(() if config.recon_s else REBUILDING))


def _image_down(width: int) -> nn.Sequential:
    first, second, last = DOWN_WIDTHS
    return nn.Sequential(nn.Linear(width, first, bias=False), nn.ReLU(), nn.Linear(first, second, bias=False),
                         nn.ReLU(), nn.Linear(second, last, bias=False))
