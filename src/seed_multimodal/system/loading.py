"""Which class a system is, and where its parts compute."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.device import BESIDE_8BIT, RELEASED_FP16, Runtime, choose_device, choose_for_pictures
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.system.images import offloaded

Log = Callable[[str], None] | None
FAMILIES = {"seed_llama": "seed.pipeline:SeedLlama", "seed_x": "seed_x.pipeline:SeedX", "lavit": "lavit.pipeline:Lavit"}


@dataclass(frozen=True)
class Runtimes:
    """Where the parts of a system compute; `offload`: of "llm", "encoder" and "decoder"."""

    llm: Runtime
    images: Runtime
    drawing: Runtime
    quantization: str | None = None
    offload: Collection[str] = ()
    load_decoder: bool = True

    @property
    def llm_home(self) -> torch.device:
        """Where the language model is loaded."""
        return torch.device("cpu") if "llm" in self.offload else self.llm.device

    @property
    def llm_device(self) -> torch.device | None:
        """Where an off-loaded language model computes."""
        return self.llm.device if "llm" in self.offload else None


def choose_runtimes(device: str, dtype: Any, image_device: str | None, drawing_device: str | None,
                    quantization: str | None, offload: bool | Collection[str], log: Log) -> Runtimes:
    """Device and precision of each part; arguments as of `MultimodalSystem.from_pretrained`."""
    runtime = choose_device(device, dtype, log=log, fp16=BESIDE_8BIT if quantization == "8bit" else "")
    images = choose_for_pictures(runtime.device if image_device is None else image_device, dtype, runtime, log)
    drawing = choose_for_pictures(images.device if drawing_device is None else drawing_device, dtype, images, log)
    return Runtimes(runtime, images, drawing, quantization, offloaded(offload) - ({"llm"} if quantization else set()))


def family(name: str) -> Any:
    """The class of a family: "seed_llama", "seed_x" or "lavit"."""
    module, _, kind = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(f"seed_multimodal.{module}"), kind)


def open_images(name: str | Path | SystemConfig, *, device: str = "auto", dtype: Any = "auto", offload: bool = False,
                log: Log = None) -> Any:
    """The `ImageCodec` of a system, or of an image tokenizer alone, without a language model.

    Raises:
        CheckpointError: a part that is missing or damaged.
    """
    config = name if isinstance(name, SystemConfig) else SystemConfig.find(name)
    config.require("vision" if config.system == "seed_x" else "tokenizer")
    runtime = choose_device(device, dtype, log, fp16=RELEASED_FP16)
    pipeline = importlib.import_module(family(config.system).__module__)
    return pipeline.load_images(config, Runtimes(runtime, runtime, runtime, offload=offloaded(offload)))
