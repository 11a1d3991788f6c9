"""Opening whatever system a name stands for: its folder's `system.json` says which it is."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from seed_multimodal.device import choose_device, choose_for_pictures
from seed_multimodal.hub import local_folder, locate_system
from seed_multimodal.systems.lavit_files import find_lavit, is_lavit_layout, is_released_lavit
from seed_multimodal.systems.picture_half import PictureHalf, off_loaded
from seed_multimodal.systems.seed_x_spec import HUB, RELEASED, find_seed_x
from seed_multimodal.systems.system_file import read_system_json
from seed_multimodal.systems.talking import Log, System

Kind = Literal["seed_llama", "seed_x", "lavit"]


def kind_of(name: str | Path) -> Kind:
    """Which system a name or folder is; SEED-LLaMA for what is not there.

    Raises:
        ConfigError: a damaged `system.json`.
    """
    if str(name).lower() in RELEASED or str(name) == HUB:
        return "seed_x"
    if is_released_lavit(name):
        return "lavit"
    folder = locate_system(name) or local_folder(name, cache=False)
    if folder is None or not folder.is_dir():
        return "seed_llama"
    if not (folder / "system.json").is_file():
        known = [own for own, _, _ in RELEASED.values()] + ["agent"]  # the last: of a merged agent, beside its `llm`
        if any((folder / own).is_dir() for own in known):
            return "seed_x"
        return "lavit" if is_lavit_layout(folder) else "seed_llama"
    kind: Kind = read_system_json(folder).system  # type: ignore[assignment]  # it was checked
    return kind


def open_system(name: str | Path, *, device: str = "auto", dtype: Any = "auto", quantization: str | None = None,
                image_device: str | None = None, offload: bool | Collection[str] = False,
                log: Log = print) -> System:
    """The system of a name or folder; arguments as of the systems' own `from_pretrained`.

    Args:
        offload: parts are on their device only while they work, or these of "llm", "encoder" and "decoder" (of
            SEED-LLaMA those that read and draw pictures).

    Raises:
        CheckpointError: a part that is missing or damaged: one sentence, with what to put where.
    """
    options: dict[str, Any] = {"device": device, "dtype": dtype, "quantization": quantization,
                               "image_device": image_device, "log": log}
    kind = kind_of(name)
    if kind == "lavit":
        from seed_multimodal.systems.lavit import Lavit

        return Lavit.from_pretrained(name, offload=offload, **options)
    if kind == "seed_x":
        from seed_multimodal.systems.seed_x import SeedX

        return SeedX.from_pretrained(name, offload=offload, **options)
    from seed_multimodal.systems.seed_llama import SeedLlama

    parts = off_loaded(offload)
    return SeedLlama.from_pretrained(name, offload_encoder="encoder" in parts, offload_decoder="decoder" in parts,
                                     **options)


def open_pictures(name: str | Path, *, device: str = "auto", dtype: Any = "auto", log: Log = print) -> PictureHalf:
    """The picture half of a SEED-X or LaVIT, without its language model; errors as `open_system`."""
    here = choose_for_pictures(device, dtype, choose_device(device, dtype, None), log)
    if kind_of(name) == "lavit":
        from seed_multimodal.systems.lavit_parts import GENERATION
        from seed_multimodal.systems.lavit_parts import load_pictures as load_lavit

        return load_lavit(find_lavit(name), here, here, (GENERATION,))
    from seed_multimodal.systems.seed_x_parts import load_pictures

    return load_pictures(find_seed_x(name), here, here)
