"""SEED-1: an image becomes 32 codes, and 32 codes become 77 embeddings in the place of Stable Diffusion's text.

    images ─► visual_encoder ─► ln_vision ─► Qformer(query_tokens) ─► encode_task_layer ─► quantize ─► codes
    codes ─► quantize rows ─► decode_task_layer ─► + pos_embed_text ─► blocks_text
          ─► Reverse_Qformer(reverse_tokens) ─► distill_text_proj ─► embeddings [77, 768]

The encode side is SEED-2's, the decode side another one (SEED-2 ends in one image embedding).
Peculiar: code k depends on queries 0..k only (causal); the 77 reverse queries see each other freely.
Attribute names are the released ones, so the state dict is the released 917 keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from seed_multimodal.tokenizers.layers import Block, LayerNorm, run_blocks
from seed_multimodal.tokenizers.qformer import QFormer
from seed_multimodal.tokenizers.quantizer import VectorQuantizer
from seed_multimodal.tokenizers.seed1_config import Seed1Config
from seed_multimodal.tokenizers.seed2 import Seed2Tokenizer, evaluating
from seed_multimodal.vision.eva import EvaVit
from seed_multimodal.weights import LoadReport


class Seed1Tokenizer(nn.Module):
    """Encoder, codebook and decoder; sizes from `config`. Construct, or load with `from_pretrained`."""

    # Pixels to codes goes through the same modules under the same names as in SEED-2: one implementation.
    device, dtype = Seed2Tokenizer.device, Seed2Tokenizer.dtype
    vision_features = Seed2Tokenizer.vision_features
    query_features, query_features_from = Seed2Tokenizer.query_features, Seed2Tokenizer.query_features_from
    pre_quant, pre_quant_from_features = Seed2Tokenizer.pre_quant, Seed2Tokenizer.pre_quant_from_features
    encode, upsample = Seed2Tokenizer.encode, Seed2Tokenizer.upsample
    check_codes, _check_images = Seed2Tokenizer.check_codes, Seed2Tokenizer._check_images

    def __init__(self, config: Seed1Config, *, ema_decay: float | None = None) -> None:
        super().__init__()
        width, d = config.qformer.width, config.codebook_dim
        self.config = config
        self.load_report: LoadReport | None = None
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query, width).normal_(std=0.02))
        self.pos_embed_text = nn.Parameter(torch.zeros(1, config.num_query, width))
        self.reverse_tokens = nn.Parameter(torch.zeros(1, config.text_tokens, width).normal_(std=0.02))
        self.visual_encoder = EvaVit(config.vit)
        self.ln_vision = LayerNorm(config.vit.width)
        self.Qformer = QFormer(config.qformer, config.vit.width)
        self.quantize = VectorQuantizer(config.codebook_size, d, normalize=config.normalize_codes,
                                        ema_decay=ema_decay, sections=config.codebook_sections)
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, d))
        self.decode_task_layer = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, width))
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
        if not len(codes):
            return torch.empty(0, self.config.text_tokens, self.config.text_features_dim, device=self.device,
                               dtype=self.dtype)
        with evaluating(self):
            return torch.cat([self.decode_embeddings(self.quantize.lookup(part))
                              for part in codes.split(batch_size or len(codes))])

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

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json` and `model.safetensors` (weights in their present dtype) into `folder`."""
        from seed_multimodal.tokenizers.loading import save_folder

        return save_folder(self, folder)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, vision: str | Path | None = None,
                        config: Seed1Config | None = None, image_size: int | None = None,
                        device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
                        log: Callable[[str], None] | None = None) -> Seed1Tokenizer:
        """Load our folder or the released layout, in eval mode; see `seed1_loading.load_seed1`."""
        from seed_multimodal.tokenizers.seed1_loading import load_seed1

        return load_seed1(source, vision=vision, config=config, image_size=image_size, device=device, dtype=dtype,
                          log=log)
