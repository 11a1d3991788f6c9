"""Opening whatever system a name stands for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from seed_multimodal.device import choose_device, choose_for_pictures
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.systems.picture_half import PictureHalf, off_loaded
from seed_multimodal.systems.talking import Log, System


def open_system(name: str | Path, *, device: str = "auto", dtype: Any = "auto", quantization: str | None = None,
                image_device: str | None = None, offload: bool | Collection[str] = False,
                log: Log = print) -> System:
    """The system of a name or folder; arguments and errors as of the systems' own `from_pretrained`.

    `offload`: parts are on their device only while they work, or these of "llm", "encoder" and "decoder" (of SEED-LLaMA
    those that read and draw images).
    """
    spec = SystemConfig.find(name)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "quantization": quantization,
                               "image_device": image_device, "log": log}
    if spec.system == "lavit":
        from seed_multimodal.systems.lavit import Lavit

        return Lavit.from_pretrained(spec, offload=offload, **options)
    if spec.system == "seed_x":
        from seed_multimodal.systems.seed_x import SeedX

        return SeedX.from_pretrained(spec, offload=offload, **options)
    from seed_multimodal.systems.seed_llama import SeedLlama

    parts = off_loaded(offload)
    return SeedLlama.from_pretrained(spec, offload_encoder="encoder" in parts, offload_decoder="decoder" in parts,
                                     **options)


def open_pictures(name: str | Path, *, device: str = "auto", dtype: Any = "auto", log: Log = print) -> PictureHalf:
    """The picture half of a SEED-X or LaVIT, without its language model; errors as `open_system`."""
    here = choose_for_pictures(device, dtype, choose_device(device, dtype, None), log)
    spec = SystemConfig.find(name)
    if spec.system == "lavit":
        from seed_multimodal.systems.lavit_parts import GENERATION
        from seed_multimodal.systems.lavit_parts import load_pictures as load_lavit

        return load_lavit(spec, here, here, (GENERATION,))
    from seed_multimodal.systems.seed_x_parts import load_rebuilder

    return load_rebuilder(spec.require("vision"), here, here)
