"""SEED-1 and SEED-2: images → 32 codes of a codebook → embeddings that condition a diffusion model.

    images ─► visual_encoder ─► ln_vision ─► Qformer ─► encode_task_layer ─► quantize ─► codes
    codes ─► codebook rows ─► decode_task_layer ─► positions, blocks ─► head ─► embeddings

SEED-2's head (`image_down`, or the Reverse Q-Former in the published training code) gives one image
embedding, SEED-1's Reverse Q-Former 77 text-like embeddings. Code k depends only on queries 0..k
(causal), so the first k codes can be decoded without the others. Attribute names are the original
ones.

Shape suffixes: B images, N patches, Q queries (32), D width of the Q-Former, d width of a code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from seed_multimodal.models.seed.checkpoints import (
    OPTIONAL_TENSORS,
    SEED1,
    SEED2,
    VISION,
    Layout,
    read_tokenizer,
)
from seed_multimodal.models.seed.configuration import Seed1Config, Seed2Config, TokenizerConfig
from seed_multimodal.models.seed.qformer import QFormer
from seed_multimodal.nn.layers import Block, LayerNorm, evaluating, task_layer
from seed_multimodal.nn.pretrained import PretrainedNetwork
from seed_multimodal.nn.quantizer import build_quantizer
from seed_multimodal.nn.vision.base import VisionEncoder

DOWN_WIDTHS = (256, 128, 32)
# Names of SEED-1's decoder in the published training code.
TEXT_NAMES = ("Reverse_Qformer_text.", "reverse_tokens_text")


class SeedEncoder(nn.Module):
    """Vision encoder and Q-Former, of the tokenizers and of their first training stage.

    Subclasses call `add_encoder` where the original state dict has these parts.
    """

    config: TokenizerConfig
    query_tokens: nn.Parameter
    visual_encoder: VisionEncoder  # its features are read with the class token

    def add_query_tokens(self, config: TokenizerConfig) -> None:
        """The queries of the Q-Former."""
        self.config = config
        self.query_tokens = nn.Parameter(
            torch.zeros(1, config.num_query, config.qformer.width).normal_(std=0.02)
        )

    def add_encoder(self, vocab_size: int | None = None, lm_head: bool = False) -> None:
        """Vision encoder and Q-Former; `vocab_size`, `lm_head`: with a text path."""
        self.visual_encoder = self.config.vit.build()
        width = self.visual_encoder.width
        self.ln_vision = LayerNorm(width)
        self.Qformer = QFormer(self.config.qformer, width, vocab_size, lm_head)

    def vit_features(self, images: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → output of the vision encoder `[B, N, W]`."""
        return self.visual_encoder(images)

    def query_features_from(self, vision_BNW: Tensor) -> Tensor:
        """Output of the vision encoder `[B, N, W]` → Q-Former output `[B, 32, D]`."""
        queries_BQD = self.query_tokens.expand(len(vision_BNW), -1, -1)
        return self.Qformer(queries_BQD, self.ln_vision(vision_BNW))


class SeedTokenizer(SeedEncoder, PretrainedNetwork[TokenizerConfig]):
    """Encoder and codebook. Subclasses call `add_codebook`, then add their decoder."""

    layout: ClassVar[Layout]
    config: TokenizerConfig

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.add_query_tokens(config)

    def add_codebook(self) -> None:
        """Encoder, codebook and the layers around it, in the original order."""
        config = self.config
        width = config.qformer.width
        code_dim = config.codebook_dim
        self.add_encoder()
        self.quantize = build_quantizer(
            config.quantizer,
            config.codebook_size,
            code_dim,
            levels=config.fsq_levels,
            normalize=config.normalize_codes,
            sections=config.codebook_sections,
        )
        # Between the widths of the Q-Former and of the codes.
        self.encode_task_layer = task_layer(width, code_dim)
        self.decode_task_layer = task_layer(code_dim, width)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        vision: str | Path | None = None,
        config: TokenizerConfig | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        log: Callable[[str], None] | None = None,
    ) -> Self:
        """Load our folder, original files, one file or a hub id, in eval mode and frozen.

        folder: see `models.seed.checkpoints`.
        vision: file of the vision encoder, if it is not in or next to `folder`.
        config: sizes; None: our `config.json` next to the weights, else the original ones.
        log: receives one line about what was loaded and ignored.

        Raises:
            CheckpointError: missing files (with instructions), damaged or unsafe ones, or tensors
                that are missing or of another size.
        """
        config, state, source = read_tokenizer(cls.layout, folder, vision, config)
        state = cls.original_names(state)
        model = cls.from_original(config, state, source, device=device, dtype=dtype)
        if log is not None and model.load_report is not None:
            log(model.load_report.describe())
        return model

    @classmethod
    def from_original(
        cls,
        config: TokenizerConfig,
        state: Mapping[str, Tensor],
        source: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """A tokenizer from tensors by their original names; raises as `from_pretrained`."""
        return cls.from_state_dict(
            config,
            config.vit.fit_weights(state, VISION),
            source,
            foreign=True,
            allow_missing=["*position_ids"],
            allow_unexpected=[*OPTIONAL_TENSORS, *(VISION + name for name in config.vit.unused)],
            device=device,
            dtype=dtype,
        )

    @classmethod
    def original_names(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a training checkpoint by their original names."""
        return dict(state)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; images are cast to it."""
        return self.query_tokens.dtype

    # ---- image → codes

    def query_features(self, images: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → Q-Former output `[B, 32, D]`."""
        return self.query_features_from(self.vit_features(images))

    def pre_quant(self, images: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → features to quantise `[B, 32, d]`, with gradients."""
        return self.encode_task_layer(self.query_features(images))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pixels as of the encoder's preprocessing `[B, 3, S, S]` → codes `[B, 32]` int64.

        The codes are on the model's device. Raises `ImageError` for another image size. One image
        may be `[3, S, S]`.
        """
        if images.ndim == 3:
            images = images[None]
        # Without dropout, or the same image would get different codes.
        with evaluating(self):
            features = self.pre_quant(images.to(self.query_tokens))
            return self.quantize.nearest(features)

    # ---- codes → embeddings

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[B, 32]` → embeddings `[B, E]` (SEED-2) or `[B, 77, E]` (SEED-1).

        A code of -1 is left out: its row is zeros, as in a stage 2 trained with `nested`; the
        original weights were not trained for this and need not give a similar image.
        """
        with evaluating(self):
            return self.project(self.decode_tokens(codes))

    @torch.no_grad()
    def decode_tokens(self, codes: Tensor) -> Tensor:
        """As `decode`, an embedding of each code, before they are pooled: `[B, 32, D]`."""
        codes = codes.to(self.query_tokens.device)
        rows_BQd = self.quantize.lookup(codes.clamp(min=0))
        rows_BQd = rows_BQd.masked_fill((codes < 0)[..., None], 0)
        with evaluating(self):
            return self.decoder_tokens(self.decode_task_layer(rows_BQd))

    def decoder_tokens(self, up_BQD: Tensor) -> Tensor:
        """Output of `decode_task_layer` → output of the decoder's blocks `[B, 32, D]`."""
        raise NotImplementedError

    def project(self, tokens_BQD: Tensor) -> Tensor:
        """Output of the decoder's blocks → embeddings as of `decode`, not normalised."""
        raise NotImplementedError

    def reverse_queries(self, tokens_BQD: Tensor) -> Tensor:
        """Output of the decoder's blocks → output of the Reverse Q-Former.

        `[B, 32, D]` → `[B, 1, D]` (SEED-2) or `[B, 77, D]` (SEED-1).
        """
        reverse_tokens = self.reverse_tokens.expand(len(tokens_BQD), -1, -1)
        return self.Reverse_Qformer(reverse_tokens, tokens_BQD)

    def rebuild_queries(self, up_BQD: Tensor) -> Tensor:
        """Output of `decode_task_layer` → reconstructed Q-Former output `[B, 32, D]` (a loss)."""
        return run_blocks(up_BQD + self.pos_embed, self.blocks)


class Seed2Tokenizer(SeedTokenizer):
    """SEED-2; the state dict has the original 881 keys, or 1134 with the Reverse Q-Former."""

    layout = SEED2
    config_class = Seed2Config
    model_type = Seed2Config.model_type
    config: Seed2Config

    def __init__(self, config: Seed2Config) -> None:
        super().__init__(config)
        width = config.qformer.width
        # 1. Parameters, as everything here in the order of the original state dict.
        if config.recon_s:
            self.pos_embed = nn.Parameter(torch.zeros(1, config.num_query, width))
        self.pos_embed_image = nn.Parameter(torch.zeros(1, config.num_query, width))
        if config.use_qformer_image:
            self.reverse_tokens = nn.Parameter(torch.zeros(1, 1, width).normal_(std=0.02))

        # 2. Encoder and codebook, then the decoder's blocks.
        self.add_codebook()
        if config.recon_s:
            self.blocks = decode_blocks(config)
        self.blocks_image = decode_blocks(config)

        # 3. The head: one reverse query, or all 32 outputs narrowed and joined.
        if config.use_qformer_image:
            self.Reverse_Qformer = QFormer(config.reverse_qformer, width)
            self.distill_image_proj = nn.Linear(width, config.image_features_dim)
        else:
            first, second, last = DOWN_WIDTHS
            self.image_down = nn.Sequential(
                nn.Linear(width, first, bias=False),
                nn.ReLU(),
                nn.Linear(first, second, bias=False),
                nn.ReLU(),
                nn.Linear(second, last, bias=False),
            )
            self.distill_image_proj = nn.Linear(config.num_query * last, config.image_features_dim)

    def decoder_tokens(self, up_BQD: Tensor) -> Tensor:
        return run_blocks(up_BQD + self.pos_embed_image, self.blocks_image)

    def project(self, tokens_BQD: Tensor) -> Tensor:
        if self.config.use_qformer_image:
            reverse_B1D = self.reverse_queries(tokens_BQD)
            return self.distill_image_proj(reverse_B1D).squeeze(1)
        narrow = self.image_down(tokens_BQD).flatten(1)  # [B, 32 · 32]
        return self.distill_image_proj(narrow)


class Seed1Tokenizer(SeedTokenizer):
    """SEED-1; the state dict has the original 917 keys. All reverse queries see each other."""

    layout = SEED1
    config_class = Seed1Config
    model_type = Seed1Config.model_type
    config: Seed1Config

    def __init__(self, config: Seed1Config) -> None:
        super().__init__(config)
        width = config.qformer.width
        # In the order of the original state dict.
        self.pos_embed_text = nn.Parameter(torch.zeros(1, config.num_query, width))
        self.reverse_tokens = nn.Parameter(
            torch.zeros(1, config.text_tokens, width).normal_(std=0.02)
        )
        self.add_codebook()
        self.blocks_text = decode_blocks(config)
        self.Reverse_Qformer = QFormer(config.reverse_qformer, width)
        self.distill_text_proj = nn.Linear(width, config.text_features_dim)

    def decoder_tokens(self, up_BQD: Tensor) -> Tensor:
        return run_blocks(up_BQD + self.pos_embed_text, self.blocks_text)

    def project(self, tokens_BQD: Tensor) -> Tensor:
        return self.distill_text_proj(self.reverse_queries(tokens_BQD))

    @classmethod
    def original_names(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a training checkpoint by their original names.

        The published training code has both decoders: SEED-1's is its text branch, and SEED-2's
        image branch has the names without `_text`.
        """
        if not any(name.startswith(TEXT_NAMES) for name in state):
            return dict(state)
        renamed: dict[str, Tensor] = {}
        for name, value in state.items():
            if name.startswith(TEXT_NAMES):
                renamed[name.replace("_text", "")] = value
            # SEED-2's Reverse Q-Former, which had these names, is left out.
            elif not name.startswith(("Reverse_Q", "reverse_t")):
                renamed[name] = value
        return renamed


def decode_blocks(config: TokenizerConfig) -> nn.ModuleList:
    """Transformer blocks of a decoder."""
    return nn.ModuleList(
        Block(config.qformer.width, config.decode_heads) for _ in range(config.decode_depth)
    )


def run_blocks(x_BND: Tensor, blocks: nn.ModuleList) -> Tensor:
    """Apply the blocks in order: `[B, N, D]` → `[B, N, D]`."""
    for block in blocks:
        x_BND = block(x_BND)
    return x_BND


def keep_first_rows(quant_BQd: Tensor, lengths_B: Tensor) -> Tensor:
    """Codebook rows `[B, 32, d]` with zeros after the first `lengths` `[B]` of each image."""
    positions_Q = torch.arange(quant_BQd.shape[1], device=lengths_B.device)
    mask_BQ = positions_Q < lengths_B[:, None]
    return quant_BQd * mask_BQ.to(quant_BQd)[..., None]
