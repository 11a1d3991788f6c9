"""SEED-2: an image becomes 32 codes of a codebook, and 32 codes become one image embedding.

    images ─► visual_encoder ─► ln_vision ─► Qformer(query_tokens) ─► encode_task_layer ─► quantize ─► codes
    codes ─► quantize rows ─► decode_task_layer ─► + pos_embed_image ─► blocks_image ─► head ─► image embedding

The head is `image_down` + flatten (released weights) or the Reverse Q-Former (published training code).
`pos_embed`/`blocks` rebuild the Q-Former's output: a training objective, unused at inference, part of the checkpoint.
Peculiar: code k depends on queries 0..k only (causal); the embedding is not normalised.
Attribute names are the released ones, so the state dict is the released 881 (Reverse Q-Former: 1134) keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from seed_multimodal.errors import CodesError, ConfigError, ImageError
from seed_multimodal.tokenizers.layers import Block, LayerNorm, run_blocks
from seed_multimodal.tokenizers.qformer import QFormer
from seed_multimodal.tokenizers.quantizer import VectorQuantizer
from seed_multimodal.tokenizers.seed2_config import Seed2Config
from seed_multimodal.vision.eva import EvaVit
from seed_multimodal.weights import LoadReport

DOWN_WIDTHS = (256, 128, 32)


class Seed2Tokenizer(nn.Module):
    """Encoder, codebook and decoder; sizes from `config`. Construct, or load with `from_pretrained`."""

    def __init__(self, config: Seed2Config, *, ema_decay: float | None = None) -> None:
        super().__init__()
        width = config.qformer.width
        self.config = config
        self.load_report: LoadReport | None = None
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query, width).normal_(std=0.02))
        if config.recon_s:
            self.pos_embed = nn.Parameter(torch.zeros(1, config.num_query, width))
        self.pos_embed_image = nn.Parameter(torch.zeros(1, config.num_query, width))
        if config.use_qformer_image:
            self.reverse_tokens = nn.Parameter(torch.zeros(1, 1, width).normal_(std=0.02))
        self.visual_encoder = EvaVit(config.vit)
        self.ln_vision = LayerNorm(config.vit.width)
        self.Qformer = QFormer(config.qformer, config.vit.width)
        self.quantize = VectorQuantizer(config.codebook_size, config.codebook_dim, normalize=config.normalize_codes,
                                        ema_decay=ema_decay, sections=config.codebook_sections)
        d = config.codebook_dim
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, d))
        self.decode_task_layer = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, width))
        if config.recon_s:
            self.blocks = nn.ModuleList(Block(width, config.decode_heads) for _ in range(config.decode_depth))
        self.blocks_image = nn.ModuleList(Block(width, config.decode_heads) for _ in range(config.decode_depth))
        if config.use_qformer_image:
            self.Reverse_Qformer = QFormer(config.reverse_qformer, width)
            self.distill_image_proj = nn.Linear(width, config.image_features_dim)
        else:
            self.image_down = _image_down(width)
            self.distill_image_proj = nn.Linear(config.num_query * DOWN_WIDTHS[-1], config.image_features_dim)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.query_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights; images are cast to it."""
        return self.query_tokens.dtype

    # ---- image → codes

    def vision_features(self, images: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → tokens after `ln_vision` `[B, N, W]`."""
        return self.ln_vision(self.visual_encoder(images))

    def query_features_from(self, vision_BNW: Tensor) -> Tensor:
        """Tokens after `ln_vision` `[B, N, W]` → Q-Former output `[B, 32, D]`."""
        return self.Qformer(self.query_tokens.expand(len(vision_BNW), -1, -1), vision_BNW)

    def query_features(self, images: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → Q-Former output `[B, 32, D]`."""
        return self.query_features_from(self.vision_features(images))

    def pre_quant_from_features(self, query_BQD: Tensor) -> Tensor:
        """Q-Former output `[B, 32, D]` → features to quantise `[B, 32, d]`."""
        return self.encode_task_layer(query_BQD)

    def pre_quant(self, images: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → features to quantise `[B, 32, d]`, with gradients."""
        return self.pre_quant_from_features(self.query_features(images))

    @torch.no_grad()
    def encode(self, images: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Images → codes.

        Args:
            images: CLIP-normalised floating pixels `[B, 3, S, S]` (or one `[3, S, S]`), on any device.
            batch_size: images per forward pass (default: all at once).

        Returns:
            `[B, 32]` int64 on the model's device.

        Raises:
            ImageError: not a floating tensor of that shape and size.
        """
        images = self._check_images(images)
        with evaluating(self):
            return _chunked(lambda part: self.quantize.nearest(self.pre_quant(part.to(self.device, self.dtype))),
                            images, batch_size, images.new_empty(0, self.config.num_query, dtype=torch.long))

    # ---- codes → embedding

    @torch.no_grad()
    def decode(self, codes: Tensor | Sequence, *, batch_size: int | None = None) -> Tensor:
        """Codes `[B, 32]` (or one row of 32) → image embeddings `[B, image_features_dim]`.

        Raises:
            CodesError: wrong number of codes, or one outside the codebook.
        """
        codes = self.check_codes(codes)
        with evaluating(self):
            return _chunked(lambda part: self.decode_embedding(self.quantize.lookup(part)), codes, batch_size,
                            torch.empty(0, self.config.image_features_dim, device=self.device, dtype=self.dtype))

    def upsample(self, quant_BQd: Tensor) -> Tensor:
        """Codebook rows (or straight-through codes) `[B, 32, d]` → `[B, 32, D]`."""
        return self.decode_task_layer(quant_BQd)

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

    # ---- checks, files

    def _check_images(self, images: Tensor) -> Tensor:
        size = self.config.vit.image_size
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = f"{images.dtype} tensor" if isinstance(images, Tensor) else type(images).__name__
            raise ImageError(f"Images must be a normalised floating tensor [B, 3, {size}, {size}], got a {got}.")
        if images.ndim == 3:
            images = images[None]
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ImageError(f"Images must be [B, 3, {size}, {size}], got {list(images.shape)}.")
        return images

    def check_codes(self, codes: Tensor | Sequence) -> Tensor:
        """Codes as `[B, 32]` int64 on the model's device; raises `CodesError` in one sentence."""
        count, size = self.config.num_query, self.config.codebook_size
        try:
            codes = torch.as_tensor(codes)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CodesError(f"Codes must be rows of {count} whole numbers ({error}).") from error
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            if codes.numel():
                raise CodesError(f"Codes must be whole numbers, got {str(codes.dtype).removeprefix('torch.')}.")
        if codes.ndim == 1:
            codes = codes[None]
        if codes.ndim != 2 or codes.shape[1] != count:
            raise CodesError(f"An image has {count} codes, got an array of shape {list(codes.shape)}.")
        codes = codes.long()
        outside = (codes < 0) | (codes >= size)
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise CodesError(f"Code {int(codes[row, column])} (image {row}, position {column}) is outside the "
                             f"codebook 0..{size - 1}.")
        return codes.to(self.device)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json` and `model.safetensors` (weights in their present dtype) into `folder`."""
        from seed_multimodal.tokenizers.loading import save_folder

        return save_folder(self, folder)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, vision: str | Path | None = None,
                        config: Seed2Config | None = None, image_size: int | None = None,
                        device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
                        log: Callable[[str], None] | None = None) -> Seed2Tokenizer:
        """Load our folder, the released layout or a single file, in eval mode; see `loading.load_tokenizer`."""
        from seed_multimodal.tokenizers.loading import load_tokenizer

        return load_tokenizer(source, vision=vision, config=config, image_size=image_size, device=device,
                              dtype=dtype, log=log)


def _image_down(width: int) -> nn.Sequential:
    first, second, last = DOWN_WIDTHS
    return nn.Sequential(nn.Linear(width, first, bias=False), nn.ReLU(), nn.Linear(first, second, bias=False),
                         nn.ReLU(), nn.Linear(second, last, bias=False))


def _chunked(function: Callable[[Tensor], Tensor], batch: Tensor, size: int | None, empty: Tensor) -> Tensor:
    if not len(batch):
        return empty
    parts = [function(part) for part in batch.split(size or len(batch))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout) inside, every submodule's own mode restored after."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
