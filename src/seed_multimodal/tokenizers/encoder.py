"""Encoder of SEED-1 and SEED-2: pixels become 32 codes of a codebook; codes are checked before they are decoded.

    images ─► visual_encoder ─► ln_vision ─► Qformer(query_tokens) ─► encode_task_layer ─► quantize ─► codes

A tokenizer derives from `CodeTokenizer` and adds how codes are decoded. Attribute names are the released ones.
Note: code k depends on queries 0..k only (causal), so the first k codes are a picture of their own: progressive
decoding gives the decoder zeros for the rest (`first_rows`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from seed_multimodal.errors import CodesError, ConfigError, ImageError, first_line
from seed_multimodal.nn.eva import EvaVit
from seed_multimodal.nn.layers import Block, LayerNorm
from seed_multimodal.nn.quantizer import VectorQuantizer
from seed_multimodal.settings import check_value
from seed_multimodal.tokenizers.checkpoints import PretrainedTokenizer
from seed_multimodal.tokenizers.qformer import QFormer
from seed_multimodal.tokenizers.tokenizer_config import TokenizerConfig

First = int | Sequence[int] | Tensor | None


class CodeTokenizer(PretrainedTokenizer, nn.Module):
    """The encode side. A subclass makes its parameters, calls `add_encoder`, then makes its decode side, of which
    `decode_embeddings` is the whole; `config` is a `TokenizerConfig`."""

    query_tokens: nn.Parameter
    progressive: ClassVar[bool] = False  # whether its decoder takes the first codes alone

    def add_encoder(self, ema_decay: float | None) -> None:
        """Tower, Q-Former, codebook and the layers around it, in the released order of the state dict."""
        config = self.config
        width, d = config.qformer.width, config.codebook_dim
        self.visual_encoder = EvaVit(config.vit)
        self.ln_vision = LayerNorm(config.vit.width)
        self.Qformer = QFormer(config.qformer, config.vit.width)
        self.quantize = VectorQuantizer(config.codebook_size, d, normalize=config.normalize_codes,
                                        ema_decay=ema_decay, sections=config.codebook_sections)
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, d))
        self.decode_task_layer = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, width))

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
            ImageError: not a floating tensor of that shape and size. ConfigError: a batch size below 1.
        """
        images = self.check_images(images)
        with evaluating(self):
            return chunked(lambda part: self.quantize.nearest(self.pre_quant(part.to(self.device, self.dtype))),
                           images, batch_size, images.new_empty(0, self.config.num_query, dtype=torch.long))

    def upsample(self, quant_BQd: Tensor) -> Tensor:
        """Codebook rows (or straight-through codes) `[B, 32, d]` → `[B, 32, D]`."""
        return self.decode_task_layer(quant_BQd)

    # ---- codes → embedding

    @torch.no_grad()
    def decode(self, codes: Tensor | Sequence, *, first: First = None, batch_size: int | None = None) -> Tensor:
        """Codes `[B, 32]` (or one row of 32) → embeddings `[B, *config.embedding_shape]`.

        Args:
            first: progressive decoding: how many of the codes to decode from, see `check_prefixes`. The places after
                them hold zeros, as in a stage 2 trained with `nested`. The released weights were not trained so: from
                their first codes comes a picture, but nobody taught the decoder what to make of the gap, and it need
                not resemble the whole one.

        Raises:
            CodesError: wrong number of codes, or one outside the codebook.
            ConfigError: `first` that `check_prefixes` refuses.
        """
        codes, wanted = self.check_prefixes(codes, first)
        both = codes if wanted is None else torch.cat([codes, wanted[:, None]], 1)

        def embed(part: Tensor) -> Tensor:
            quant = self.quantize.lookup(part[:, :self.config.num_query])
            return self.decode_embeddings(quant if wanted is None else first_rows(quant, part[:, -1:]))

        empty = torch.empty(0, *self.config.embedding_shape, device=self.device, dtype=self.dtype)
        with evaluating(self):
            return chunked(embed, both, batch_size, empty)

    def decode_embeddings(self, quant_BQd: Tensor) -> Tensor:
        """Codebook rows (or straight-through codes) `[B, 32, d]` → embeddings, with gradients."""
        raise NotImplementedError

    def rebuild_queries(self, up_BQD: Tensor) -> Tensor:
        """`upsample`d codes → the Q-Former output they stand for `[B, 32, D]` (training objective).

        Raises:
            ConfigError: a model built with `recon_s=False` has no such blocks.
        """
        if not hasattr(self, "blocks"):
            raise ConfigError("This tokenizer was built with recon_s=False: it has no blocks that rebuild the queries.")
        return run_blocks(up_BQD + self.pos_embed, self.blocks)

    # ---- checks

    def check_images(self, images: Tensor) -> Tensor:
        """Pixels as `[B, 3, S, S]`; raises `ImageError` in one sentence."""
        size = self.config.vit.image_size
        shapes_only = isinstance(images, Tensor) and images.is_meta and self.device.type != "meta"
        if not _is_dense(images) or shapes_only or not images.is_floating_point():
            got = (f"{images.dtype} tensor on {images.device.type}, {images.layout}" if isinstance(images, Tensor)
                   else type(images).__name__)
            raise ImageError(f"Images must be a normalised floating tensor [B, 3, {size}, {size}], got a {got}.")
        if images.ndim == 3:
            images = images[None]
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ImageError(f"Images must be [B, 3, {size}, {size}], got {list(images.shape)}.")
        return images

    def check_prefixes(self, codes: Tensor | Sequence, first: First) -> tuple[Tensor, Tensor | None]:
        """Codes `[B, 32]`, and how many of each row count `[B]` (None: all), int64 on the model's device.

        Args:
            first: one number for all rows, one each, or several for one row, which is then repeated. Rows may be as
                short as the largest number, and are filled up with code 0.

        Raises:
            CodesError: as `check_codes`.
            ConfigError: numbers that are not from 1 to 32, too many or too few, or a model that is not `progressive`.
        """
        if first is None:
            return self.check_codes(codes), None
        numbers = self.check_counts(first)
        rows = self.check_codes(codes, max(numbers, default=self.config.num_query))
        rows = rows.expand(len(numbers), -1) if len(rows) == 1 and numbers else rows
        if len(numbers) not in (1, len(rows)):
            raise ConfigError(f"{len(rows)} pictures were given with {len(numbers)} numbers of codes; give one for "
                              f"all, or one each.")
        return rows, torch.tensor(numbers, device=rows.device).expand(len(rows))

    def check_counts(self, first: First) -> list[int]:
        """Numbers of codes to draw from as a list, empty for None; raises `ConfigError` as `check_prefixes`."""
        if first is None:
            return []
        if not self.progressive:
            raise ConfigError(f"{self.layout.name} makes no picture from its first codes alone; SEED-2 does.")
        given = first.tolist() if hasattr(first, "tolist") else first
        return [check_value(int, one, "The number of codes to draw from", least=1, most=self.config.num_query)
                for one in (given if several_counts(given) else [given])]

    def check_codes(self, codes: Tensor | Sequence, shortest: int = 0) -> Tensor:
        """Codes as `[B, 32]` int64 on the model's device; raises `CodesError` in one sentence.

        Args:
            shortest: if given, rows may have so few codes; they are filled up with code 0.
        """
        count, size = self.config.num_query, self.config.codebook_size
        try:
            codes = torch.as_tensor(codes)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CodesError(f"Codes must be rows of {count} whole numbers ({first_line(error)}).") from error
        if not _is_dense(codes) or codes.is_meta:
            raise CodesError(f"Codes must be a plain tensor, not one of {codes.device.type}, {codes.layout}.")
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            if codes.numel():
                raise CodesError(f"Codes must be whole numbers, got {str(codes.dtype).removeprefix('torch.')}.")
        if codes.ndim == 1:
            codes = codes[None]
        if codes.ndim != 2 or not (shortest or count) <= codes.shape[1] <= count:
            raise CodesError(f"An image has {count} codes, got an array of shape {list(codes.shape)}.")
        codes = codes.long()
        outside = (codes < 0) | (codes >= size)
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise CodesError(f"Code {int(codes[row, column])} (image {row}, position {column}) is outside the "
                             f"codebook 0..{size - 1}.")
        return nn.functional.pad(codes, (0, count - codes.shape[1])).to(self.device)


def decode_blocks(config: TokenizerConfig) -> nn.ModuleList:
    """Transformer blocks of a decode side."""
    return nn.ModuleList(Block(config.qformer.width, config.decode_heads) for _ in range(config.decode_depth))


def run_blocks(x_BND: Tensor, blocks: nn.ModuleList) -> Tensor:
    """Apply the blocks in order: `[B, N, D]` → `[B, N, D]`."""
    for block in blocks:
        x_BND = block(x_BND)
    return x_BND


def several_counts(first: First) -> bool:
    """Whether `first` names several numbers of codes (a list, a range, an array) rather than one for all."""
    return getattr(first, "ndim", 0) > 0 or (isinstance(first, Sequence) and not isinstance(first, str | bytes))


def first_rows(quant_BQd: Tensor, first: Tensor) -> Tensor:
    """Codebook rows `[B, 32, d]` with zeros after the first k of each, `first` int64 `[B, 1]`."""
    shown = torch.arange(quant_BQd.shape[1], device=first.device) < first
    return quant_BQd * shown.to(quant_BQd)[..., None]


def chunked(function: Callable[[Tensor], Tensor], batch: Tensor, size: int | None, empty: Tensor) -> Tensor:
    """`function` of a batch, `size` rows at a time (None: all at once); `empty` if there are none."""
    check_batch_size(size)
    if not len(batch):
        return empty
    parts = [function(part) for part in batch.split(len(batch) if size is None else size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def check_batch_size(size: int | None) -> None:
    """Refuse a number that no batch can have; raises `ConfigError`."""
    check_value(int | None, size, "batch_size", least=1)


def _is_dense(value: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor whose numbers lie one by one: not a sparse or nested one."""
    return isinstance(value, Tensor) and value.layout is torch.strided


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
