"""Image encoder and decoder of a system (the de-tokenizer is loaded on first use), and devices of its parts."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn

from seed_multimodal.device import FP16_AS_ORIGINAL, Runtime, choose_device, on_device
from seed_multimodal.errors import CheckpointError, CodesError
from seed_multimodal.images.io import open_image
from seed_multimodal.inference.batching import DynamicBatcher
from seed_multimodal.inference.opening import EngineOptions
from seed_multimodal.inference.prompt import random_seed
from seed_multimodal.progress import quiet_loading
from seed_multimodal.settings import SEEDS, check_value
from seed_multimodal.system.config import SystemConfig

Log = Callable[[str], None] | None
FAMILIES = {
    "seed_llama": "seed.pipeline:SeedLlama",
    "seed_x": "seed_x.pipeline:SeedX",
    "lavit": "lavit.pipeline:Lavit",
}
OFFLOADED = frozenset(("llm", "encoder", "decoder"))


@dataclass(frozen=True)
class Placement:
    """Devices of parts; `offload`: those of "llm", "encoder" and "decoder" that stay on the CPU while idle."""

    llm: Runtime
    images: Runtime
    drawing: Runtime
    quantization: str | None = None
    offload: Collection[str] = ()
    load_decoder: bool = True
    engine: EngineOptions = EngineOptions()

    @property
    def llm_load_device(self) -> torch.device:
        """The device on which the language model is loaded."""
        return torch.device("cpu") if "llm" in self.offload else self.llm.device


def family_class(system: str) -> Any:
    """The class of a family: "seed_llama", "seed_x" or "lavit"."""
    module, _, kind = FAMILIES[system].partition(":")
    return getattr(importlib.import_module(f"seed_multimodal.{module}"), kind)


def open_images(
    name: str | Path | SystemConfig,
    *,
    device: str = "auto",
    dtype: Any = "auto",
    offload: bool = False,
    log: Log = None,
) -> Any:
    """The `ImageCodec` of a system, without its language model, or of an image tokenizer."""
    config = name if isinstance(name, SystemConfig) else SystemConfig.find(name)
    config.require("vision" if config.system == "seed_x" else "tokenizer")
    runtime = choose_device(device, dtype, log, fp16=FP16_AS_ORIGINAL)
    pipeline = importlib.import_module(family_class(config.system).__module__)
    return pipeline.load_images(
        config, Placement(runtime, runtime, runtime, offload=OFFLOADED if offload else ())
    )


class ImageCodec:
    """Images ⇄ codes or features. Families define `encode(images)` → codes or features, and `draw(values, *, seeds,
    batch_size, **settings)` → PIL images; `encode_batch` and `draw_batch` do the rows (images) of several threads.
    `load_decoder` builds the de-tokenizer; larger images are opened with at least `min_side` pixels on a side."""

    progressive: ClassVar[bool] = False  # whether the first codes of an image can be decoded
    encodes_by_seed: ClassVar[bool] = False  # whether `encode` takes `seed`
    drawing_settings: ClassVar[tuple[str, ...]] = ()  # what `draw` accepts
    codec_settings: ClassVar[tuple[str, ...]] = ()  # those of them not for the de-tokenizer
    name, advice = "This system", ""  # for the message about a missing de-tokenizer
    compiled = False
    encode: Callable[..., Any]
    draw: Callable[..., list[Image.Image]]
    encode_batch: Callable[[Any, Sequence[Any]], Sequence[Any]]
    draw_batch: Callable[[Any, Sequence[Any]], list[Image.Image]]

    def __init__(
        self,
        model: nn.Module,
        *,
        load_decoder: Callable[[], Any] | None,
        device: torch.device,
        drawing_device: torch.device | None = None,
        min_side: int | None = None,
        offload: Collection[str] = (),
    ) -> None:
        self.model, self.device, self.drawing_device = model, device, drawing_device or device
        self.min_side, self._load_decoder = min_side, load_decoder
        self._decoder: Any = None
        self._lock = threading.RLock()  # held during encoding and loading of the de-tokenizer
        self._encoded = DynamicBatcher(self.encode_batch, max_rows=32, wait=0.005)
        self._drawn = DynamicBatcher(self.draw_batch)
        self.offload(offload)

    @property
    def can_draw(self) -> bool:
        return self._load_decoder is not None

    @property
    def decoder(self) -> Any:
        """The de-tokenizer, loaded on first use. Raises CheckpointError: none."""
        with self._lock:
            if self._decoder is None:
                if self._load_decoder is None:
                    raise CheckpointError(
                        f"{self.name} has no de-tokenizer, so it cannot draw{self.advice}."
                    )
                with quiet_loading("diffusers", "transformers"):
                    self._decoder = self._load_decoder()
                self.offload(self._offload)
                if self.compiled:
                    self._decoder.unet.fuse_qkv_projections()
                    self._decoder.unet.compile_repeated_blocks()
            return self._decoder

    def offload(self, parts: Collection[str]) -> None:
        """Keep these of "encoder" and "decoder" on the CPU while idle."""
        self._offload = parts
        self.model.to("cpu" if "encoder" in parts else self.device)
        if self._decoder is not None:
            place = self._decoder.enable_cpu_offload if "decoder" in parts else self._decoder.to
            place(self.drawing_device)

    def to(self, device: str | torch.device) -> None:
        """Move the encoder, and the de-tokenizer if it is loaded."""
        self.device = self.drawing_device = torch.device(device)
        self.offload(self._offload)

    def compile(self) -> None:
        """Compile the blocks of the encoder, and of the de-tokenizer when it is loaded; once for each kind of batch."""
        self.compiled = True
        for blocks in [part for part in self.model.modules() if isinstance(part, nn.ModuleList)]:
            for block in blocks:
                block.compile()

    def check_drawing(self, **settings: Any) -> None:
        """Raise early for unknown settings of `draw` and a missing de-tokenizer."""
        self.decoder.check_settings(
            **{
                name: value
                for name, value in settings.items()
                if name not in (*self.codec_settings, "should_stop")
            }
        )

    def open(self, image: Any, name: str | None = None) -> Image.Image:
        """An image from a file, bytes, PIL or an array, as RGB; raises `ImageError` naming it."""
        return open_image(image, name=name, at_least=self.min_side)

    def draw_batched(
        self, settings: dict[str, Any], batch_size: int, *columns: Any
    ) -> list[Image.Image]:
        """Decode rows with `draw_batch`, batched with those of other threads; `settings` may have `should_stop`."""
        rows = [*zip(*columns, strict=True)]
        settings = {**settings, "batch_size": batch_size if len(rows) > batch_size else None}
        return self._drawn(settings, rows, settings.pop("should_stop", None))

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """Context with the encoder on its device, exclusively for this thread."""
        with self._lock, on_device(self.model, self.device if "encoder" in self._offload else None):
            yield


def seed_per_image(seed: Any, count: int) -> list[int]:
    """The seeds of images: one for all, one each, or None (random). Raises CodesError: another number."""
    several = seed if isinstance(seed, (list, tuple, range)) else [seed] * count
    seeds = [
        random_seed() if one is None else check_value(int, one, "A drawing's seed", **SEEDS)
        for one in several
    ]
    if len(seeds) != count:
        raise CodesError(f"{count} images were given with {len(seeds)} seeds.")
    return seeds
