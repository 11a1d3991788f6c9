"""`seed assemble`: parts that trainings made become a system folder, with the settings that follow from the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seed_multimodal.disk import making_folder, output_folder, read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError, SeedError
from seed_multimodal.language.prompts import template_for
from seed_multimodal.system_folder import join
from seed_multimodal.systems.lavit_files import find_lavit
from seed_multimodal.systems.seed_x_spec import find_seed_x
from seed_multimodal.systems.system_spec import BICUBIC, find_system

FIND: dict[str, Any] = {"seed_llama": find_system, "seed_x": find_seed_x, "lavit": find_lavit}


def assemble_system(kind: str, out: str | Path, parts: Mapping[str, str | Path],
                    settings: Mapping[str, Any] | None = None, *, force: bool = False) -> Path:
    """Make a system folder, complete or not at all.

    Args:
        kind: a key of `PARTS`; parts: of its parts the folder or file of each that is given.
        settings: of `system.json`, over the defaults.
        force: replace a folder that is not empty.

    Raises:
        CheckpointError: a part that is not there, or is needed and not given. ConfigError: settings that mean nothing,
            or `out` is not empty.
    """
    given = {name: Path(source).expanduser() for name, source in parts.items()}
    for name, source in given.items():
        if not source.exists():
            raise CheckpointError(f"{source}: there is no such folder for --{name}.")
    target = output_folder(out, force=force, what="the system", read=given.values())
    with making_folder(target, out, ConfigError) as folder:
        found = _found(kind, given)
        join(kind, folder, found, {**_of_weights(kind, found), **(settings or {})})
        try:
            FIND[kind](folder)
        except SeedError as error:
            raise type(error)(str(error).replace(str(folder), str(out))) from error
    return target


def _found(kind: str, given: dict[str, Path]) -> dict[str, Path]:
    """The parts, with those that lie inside others."""
    found = dict(given)
    if kind == "lavit":
        exported, drawn = given.get("tokenizer"), given.get("pixels")
        decoders = [place / "decoder" for place in (drawn, exported) if place is not None]
        if "decoder" not in given and (decoder := next(filter(Path.is_dir, decoders), None)):
            found["decoder"] = decoder
        if exported is not None and (exported / "tokenizer").is_dir():
            found["tokenizer"] = exported / "tokenizer"
    return found


def _of_weights(kind: str, parts: Mapping[str, Path]) -> dict[str, Any]:
    """Settings that the weights decide."""
    if kind == "lavit" and "decoder" in parts:
        return {"head": read_json_object(parts["decoder"] / "config.json").get("head", "highres")}
    if kind == "seed_llama":
        sizes, llm = (read_json_object(parts[name] / "config.json") for name in ("tokenizer", "llm"))
        return {"template": template_for(llm.get("hidden_size")), "transform": dict(BICUBIC),
                "image_size": sizes.get("vit", {}).get("image_size", 224)}
    return {}
