"""A faster encoder of a SEED tokenizer on packed weights: the same codes, the same `encode`.

    fast = optimise(tokenizer)                                        # any device
    fast = optimise(tokenizer, compile=True, cuda_graph=True,         # a GPU
                    levers=Levers(dtype=torch.bfloat16))              # from a tokenizer loaded in float32
    codes = fast.encode(images, batch_size=256)

Note: compiled functions and CUDA graphs are made for one batch size each, on its first use (seconds to minutes;
`warm_up` does it beforehand). Images are therefore taken in batches of powers of two, the last one filled up with
zeros. Give a float32 tokenizer and a half-precision `Levers.dtype`: weights are then rounded once, after packing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import check_settings, setting
from seed_multimodal.tokenizers.encoder import CodeTokenizer, First, check_batch_size, evaluating
from seed_multimodal.tokenizers.fast_encoder import FastEncoder, FastVision, compiler
from seed_multimodal.tokenizers.quantizer import VectorQuantizer
from seed_multimodal.vision.eva import EvaVit

MODES = ("default", "max-autotune", "max-autotune-tma")
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
STATIC_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GRAPH_SIZES = tuple(size for size in STATIC_SIZES if size <= 32)  # launches of larger ones are hidden
FILL_ALWAYS = 16
RECOMPILES = 64  # of one function: batch sizes times dtypes times kinds of layer


@dataclass(frozen=True)
class Levers:
    """Options that trade accuracy for speed; the defaults give the plain path's codes.

    Args:
        dtype: of the vision tower (default: the tokenizer's).
        residual_dtype: of the tower's stream (default: float32 where `dtype` is bfloat16, whose 8 bits lose a third of
            what 39 blocks add; otherwise as `dtype`).
        query_dtype: of the Q-Former's products (default: float16 on CUDA where `dtype` is half precision, as the
            released model; otherwise float32).
        head_width: fill each vision head with zeros to this width (released: 88; kernels like 96 or 128).
        gelu: `erf` as trained, or `tanh`, which a GPU computes inside the matrix product; differs by up to 0.0005.
        attention: kernel to prefer where several can: auto, flash, cudnn, efficient, math.
    """

    dtype: torch.dtype | None = None
    residual_dtype: torch.dtype | None = None
    query_dtype: torch.dtype | None = None
    head_width: int | None = None
    gelu: str = setting("erf", choices=("erf", "tanh"))
    attention: str = setting("auto", choices=("auto", *BACKENDS))

    def resolved(self, tokenizer: CodeTokenizer) -> dict[str, Any]:
        """Arguments of `FastEncoder`; raises `ConfigError` for a choice that is unknown or does not fit."""
        check_settings(self, "levers")
        own = tokenizer.config.vit.width // tokenizer.config.vit.heads
        if self.head_width is not None and self.head_width < own:
            raise ConfigError(f"head_width must be at least the vision heads' own width {own}, got {self.head_width}.")
        dtype = self.dtype or tokenizer.dtype
        for name in (dtype, self.residual_dtype, self.query_dtype):
            if name is not None and not name.is_floating_point:
                raise ConfigError(f"A tokenizer computes in a floating dtype, not {str(name).removeprefix('torch.')}.")
        half_on_gpu = dtype.itemsize == 2 and tokenizer.device.type == "cuda"
        stream = self.residual_dtype or (torch.float32 if dtype == torch.bfloat16 else dtype)
        query = self.query_dtype or (torch.float16 if half_on_gpu else torch.float32)
        head_width = None if self.head_width == own else self.head_width
        return {"dtype": dtype, "residual_dtype": stream, "query_dtype": query,
                "head_width": head_width, "gelu": self.gelu}


def optimise(tokenizer: CodeTokenizer, *, compile: bool | str = False, cuda_graph: bool = False,
             levers: Levers | None = None) -> FastTokenizer:
    """A fast encoder beside the tokenizer's decoder, on the tokenizer's device.

    Args:
        tokenizer: stays as it is; the packed encoder costs up to its memory once more and does not follow later
            changes of its weights or device.
        compile: True or `default`, or `max-autotune` (tries matrix kernels for minutes; `max-autotune-tma` also those
            for Hopper's copy engine).
        cuda_graph: replay batches of up to 32 images as one launch.

    Raises:
        ConfigError: an unknown mode or lever, or CUDA graphs asked for on another device.
    """
    mode = ("default" if compile else None) if isinstance(compile, bool) else compile
    if mode is not None and mode not in MODES:
        raise ConfigError(f"Unknown compile mode {mode!r}: use True, {', '.join(MODES)} (and cuda_graph=True).")
    if cuda_graph and tokenizer.device.type != "cuda":
        raise ConfigError(f"CUDA graphs need a tokenizer on a CUDA device, this one is on {tokenizer.device}.")
    return FastTokenizer(tokenizer, levers or Levers(), mode, cuda_graph)


class FastTokenizer:
    """The result of `optimise`: `encode` and features from the packed encoder, everything else the tokenizer's own."""

    def __init__(self, tokenizer: CodeTokenizer, levers: Levers, mode: str | None, cuda_graph: bool) -> None:
        self.tokenizer, self.levers = tokenizer, levers
        self.is_static = mode is not None or cuda_graph
        self._is_compiled = mode is not None
        choices = levers.resolved(tokenizer)
        with torch.no_grad(), evaluating(tokenizer), self._setting():
            self.encoder = FastEncoder(tokenizer, wrap=compiler(mode), **choices)
        self._graphs = _Graphs(self.encoder, tokenizer) if cuda_graph else None

    @property
    def config(self) -> Any:
        """Sizes."""
        return self.tokenizer.config

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.tokenizer.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the vision tower; images are cast to it."""
        return self.encoder.dtype

    @property
    def quantize(self) -> VectorQuantizer:
        """The tokenizer's codebook."""
        return self.tokenizer.quantize

    def encode(self, images: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` (or one `[3, S, S]`) → codes `[B, 32]` int64 on the device.

        Raises:
            ImageError: not a floating tensor of that shape and size.
        """
        return self._run(self._codes, images, batch_size, (self.config.num_query,), torch.long)

    def query_features(self, images: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Normalised pixels → Q-Former output `[B, 32, D]` float32, without gradients (stage 2's frozen side)."""
        shape = (self.config.num_query, self.config.qformer.width)
        return self._run(self.encoder.query_features, images, batch_size, shape, torch.float32)

    def vit_features(self, images: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Normalised pixels → tower output before `ln_vision` `[B, N, W]`, without gradients."""
        shape = (self.config.vit.tokens, self.config.vit.width)
        return self._run(self.encoder.vision, images, batch_size, shape, self.encoder.residual_dtype)

    @torch.no_grad()
    def codes_from(self, vit_BNW: Tensor) -> Tensor:
        """Output of `vit_features` → codes `[B, 32]` int64, as `encode` gives them."""
        with self._setting():
            return self.encoder.codes_from(vit_BNW)

    def decode(self, codes: Tensor | Sequence, *, first: First = None, batch_size: int | None = None) -> Tensor:
        """Codes `[B, 32]` (or the first of them) → embeddings; the tokenizer's own."""
        return self.tokenizer.decode(codes, first=first, batch_size=batch_size)

    def check_codes(self, codes: Tensor | Sequence) -> Tensor:
        """Codes as `[B, 32]` int64 on the device, or `CodesError`; the tokenizer's own."""
        return self.tokenizer.check_codes(codes)

    def warm_up(self, batch_sizes: Sequence[int]) -> None:
        """Compile and capture for these batch sizes now, not at their first use."""
        size = self.config.vit.image_size
        for count in batch_sizes:
            self.encode(torch.zeros(count, 3, size, size))

    @torch.no_grad()
    def _run(self, function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int | None,
             shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        images = self.tokenizer.check_images(images)
        check_batch_size(batch_size)
        if not len(images):
            return torch.empty(0, *shape, dtype=dtype, device=self.device)
        parts, start = [], 0
        with self._setting():
            for count, rows in plan(len(images), batch_size, STATIC_SIZES if self.is_static else ()):
                part = images[start:start + count].to(self.device, self.dtype)
                part = F.pad(part, (0, 0, 0, 0, 0, 0, 0, rows - count)) if rows > count else part
                parts.append(function(part)[:count])
                start += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _codes(self, images: Tensor) -> Tensor:
        if self._graphs is not None and len(images) in GRAPH_SIZES:
            return self._graphs(images)
        return self.encoder.codes(images)

    def _setting(self) -> contextlib.AbstractContextManager[None]:
        return compute_context(self.device, self.levers.attention, self._is_compiled)


class FastTower:
    """Pixels → tower output.

    Args:
        tower: stays as it is.
        dtype: of the matrix products; the residual stream is float32, as under autocast.
        compile: compile each function once per batch size (seconds, at first use).
    """

    def __init__(self, tower: EvaVit, dtype: torch.dtype, *, compile: bool = False) -> None:
        self.tower, self.dtype, self.is_compiled = tower, dtype, compile
        self._packed: FastVision | None = None
        self._packed_from: list[tuple[int, int]] = []

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → tower output before `ln_vision` `[B, N, W]` float32, without gradients.

        Raises:
            ImageError: another image size than the tower's.
        """
        self.tower.check_images(images)
        with compute_context(images.device, "auto", self.is_compiled):  # for packing, too
            return self._vision()(images.to(self.dtype))

    def _vision(self) -> FastVision:
        present = [(parameter.data_ptr(), parameter._version) for parameter in self.tower.parameters()]
        if self._packed is None or present != self._packed_from:
            self._packed = FastVision(self.tower, dtype=self.dtype, residual_dtype=torch.float32, head_width=None,
                                      gelu="erf", wrap=compiler("default" if self.is_compiled else None))
            self._packed_from = present
        return self._packed


class _Graphs:
    """One captured CUDA graph per batch size; a lock, because all calls share the captured input and output."""

    def __init__(self, encoder: FastEncoder, tokenizer: CodeTokenizer) -> None:
        self.encoder, self.device, self.size = encoder, tokenizer.device, tokenizer.config.vit.image_size
        self.lock, self.pool = threading.Lock(), torch.cuda.graph_pool_handle()
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        with self.lock:
            if len(images) not in self.captured:
                self.captured[len(images)] = self._capture(len(images))
            graph, given, codes = self.captured[len(images)]
            given.copy_(images)
            graph.replay()
            return codes.clone()

    def _capture(self, count: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given = torch.zeros(count, 3, self.size, self.size, device=self.device, dtype=self.encoder.dtype)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles, and lets libraries choose kernels, before recording
            for _ in range(3):
                self.encoder.codes(given)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            codes = self.encoder.codes(given)
        return graph, given, codes


@contextlib.contextmanager
def compute_context(device: torch.device, attention: str, is_compiled: bool) -> Iterator[None]:
    """Inside, the caller's autocast is off, an attention kernel preferred, and room for compiled functions set."""
    with contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if attention != "auto":
            first = BACKENDS[attention]
            rest = [backend for backend in BACKENDS.values() if backend != first]
            stack.enter_context(sdpa_kernel([first, *rest], set_priority=True))
        if is_compiled:
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=RECOMPILES))
        yield


def plan(count: int, limit: int | None, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Batches for `count` images: pairs (images, rows computed), at most `limit` images each.

    Without `sizes` the rows are the images. With them (ascending) rows are one of the sizes: filled up where few
    images or at most a quarter of the rows would be wasted, otherwise the largest size that fits.
    """
    chunks = []
    while count:
        room = min(count, limit or count)
        take = rows = room
        if sizes:
            fits = max((size for size in sizes if size <= room), default=sizes[0])
            above = min((size for size in sizes if size >= room), default=None)
            if above is not None and (room <= FILL_ALWAYS or 4 * room >= 3 * above):
                rows = above
            else:
                take = rows = fits
        chunks.append((take, rows))
        count -= take
    return chunks
