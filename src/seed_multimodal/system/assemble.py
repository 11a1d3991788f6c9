"""A system folder made of parts (`seed assemble`): copied under the names that `system.json` gives them, without what
only training needs; `tower.json` and `vae.json`, which name files of other systems, are rewritten for their new place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seed_multimodal.disk import making_folder, output_folder, read_json_object, replace_text
from seed_multimodal.errors import CheckpointError, ConfigError, SeedError
from seed_multimodal.language.prompts import template_for
from seed_multimodal.system.config import BICUBIC, DRAWING, INSIDE, PARTS, SystemConfig

OF_TRAINING = shutil.ignore_patterns("optimizer*", "trainer_state.json", "data_state.json", "ema.safetensors",
                                     "manifest.json", ".*")
VISUAL = "visual_weight.safetensors"  # LaVIT's second stage, which trainings write beside the language model


def assemble_system(kind: str, out: str | Path, parts: Mapping[str, str | Path],
                    settings: Mapping[str, Any] | None = None, *, force: bool = False) -> Path:
    """Make a system folder, complete or not at all, of the folders or files of its `parts`.

    Args:
        settings: of `system.json`, over those that the weights decide.
        force: replace a folder that is not empty.

    Raises:
        CheckpointError: a part that is not there. ConfigError: wrong settings, or `out` is not empty.
    """
    given = {name: Path(source).expanduser() for name, source in parts.items()}
    for name, source in given.items():
        if not source.exists():
            raise CheckpointError(f"{source}: there is no such folder for --{name}.")
    if kind == "lavit":  # an export holds both tokenizer and decoder, a trained pixel decoder its decoder
        exported = given["tokenizer"]
        decoders = [place / "decoder" for place in (given.get("pixels", exported), exported)]
        if "decoder" not in given and (decoder := next(filter(Path.is_dir, decoders), None)):
            given["decoder"] = decoder
        given["tokenizer"] = exported / "tokenizer" if (exported / "tokenizer").is_dir() else exported
    target = output_folder(out, force=force, what="the system", read=given.values())
    with making_folder(target, out, ConfigError) as folder:
        join(kind, folder, given, {**_of_weights(kind, given), **(settings or {})})
        try:
            SystemConfig.read(folder)
        except SeedError as error:
            raise type(error)(str(error).replace(str(folder), str(out))) from error
    return target


def join(kind: str, folder: Path, parts: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
    """Copy parts into a system's folder (their names there, which may be below a part; what is there already stays) and
    write its `system.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in parts.items():
        _copy(source, folder / name)
    if kind == "lavit" and (folder / "llm" / VISUAL).is_file():
        (folder / "llm" / VISUAL).replace(folder / "tokenizer" / VISUAL)
    shutil.rmtree(folder / "pixels" / "decoder", ignore_errors=True)  # the part `decoder`
    for file in (folder / "sdxl" / "unet").glob("*.safetensors"):  # its weights are the adapter's
        file.unlink()
    named = {name: name for name in PARTS[kind] if (folder / name).exists()}
    if kind == "seed_llama" and (folder / "tokenizer" / INSIDE).is_dir():
        named = {"detokenizer": f"tokenizer/{INSIDE}", **named}
    missing = {name: None for name in DRAWING if name in PARTS[kind]}  # the system cannot draw
    replace_text(folder / "system.json", json.dumps({**settings, "system": kind, **missing, **named}, indent=1))


def _of_weights(kind: str, parts: Mapping[str, Path]) -> dict[str, Any]:
    """Settings that the weights decide."""
    sizes = {name: read_json_object(parts[name] / "config.json") for name in ("tokenizer", "llm", "decoder")
             if name in parts and (parts[name] / "config.json").is_file()}
    if kind == "seed_llama":
        return {"template": template_for(sizes.get("llm", {}).get("hidden_size")), "transform": dict(BICUBIC),
                "image_size": sizes.get("tokenizer", {}).get("vit", {}).get("image_size", 224)}
    return {"head": sizes["decoder"].get("head", "highres")} if kind == "lavit" and "decoder" in sizes else {}


def _copy(source: Path, place: Path) -> None:
    """A folder's files, or one file into the folder `place`."""
    if source.is_file():
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, place / source.name)
    elif source.resolve() != place.resolve():
        shutil.copytree(source, place, dirs_exist_ok=True, ignore=OF_TRAINING)
        for file in source.rglob("*.json"):
            key = {"tower.json": "file", "vae.json": "folder"}.get(file.name)
            values = read_json_object(file) if key else {}
            if key and not (named := (file.parent / values[key]).resolve()).is_relative_to(source.resolve()):
                copied = place / file.relative_to(source)
                values[key] = Path(os.path.relpath(named, copied.parent.resolve())).as_posix()
                replace_text(copied, json.dumps(values) + "\n")
