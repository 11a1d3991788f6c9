"""System folders from parts (`seed assemble`) or from a system: copies parts under the names in `system.json`, without
training files; rewrites `tower.json` and `vae.json`, which refer to files of other systems."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seed_multimodal.disk import atomic_folder, output_folder, read_json_object, replace_text
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import ADAPTER_CONFIG, VISUAL_WEIGHTS
from seed_multimodal.language.prompts import template_for
from seed_multimodal.system.config import (
    BICUBIC,
    COMMON,
    DECODER_PARTS,
    DETOKENIZER_FOLDER,
    PARTS,
    SETTINGS,
    SystemConfig,
)

OF_TRAINING = shutil.ignore_patterns(
    "optimizer*", "trainer_state.json", "data_state.json", "ema.safetensors", "manifest.json", ".*"
)


def assemble_system(
    kind: str,
    out: str | Path,
    parts: Mapping[str, str | Path],
    settings: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
) -> Path:
    """Create a system folder from its `parts` (folders or files); `settings` override the derived ones."""
    places = {name: Path(source).expanduser() for name, source in parts.items()}
    for name, place in places.items():
        if not place.exists():
            raise CheckpointError(f"{place}: no such folder for --{name}.")
    if kind == "lavit":  # an export has tokenizer and decoder, a trained pixel decoder its decoder
        exported = places["tokenizer"]
        decoders = [place / "decoder" for place in (places.get("pixels", exported), exported)]
        if "decoder" not in places and (decoder := next(filter(Path.is_dir, decoders), None)):
            places["decoder"] = decoder
        places["tokenizer"] = (
            exported / "tokenizer" if (exported / "tokenizer").is_dir() else exported
        )
    return _written(kind, out, places, {**_of_weights(kind, places), **(settings or {})}, force)


def save_system(config: SystemConfig, out: str | Path, *, force: bool = False) -> Path:
    """Write a system with a model card as one self-contained folder; missing parts are skipped."""
    if config.original == "lavit":
        raise ConfigError(
            f"{config.name}: its parts are one folder in the original's layout already; copy that."
        )
    kind = config.system
    parts = {
        key: getattr(config, key) for key in PARTS[kind] if getattr(config, key) and config.has(key)
    }
    if (
        kind == "seed_llama"
        and "detokenizer" in parts
        and parts["detokenizer"].parent == parts["tokenizer"]
    ):
        del parts["detokenizer"]  # copied with the tokenizer
    settings = {
        key: getattr(config, key)
        for key in (*COMMON, *SETTINGS[kind])
        if getattr(config, key) is not None
    }
    if "tasks" in settings:
        settings["tasks"] = dataclasses.asdict(config.tasks)
    return _written(kind, out, parts, settings, force, card=Path(config.name) / "README.md")


def _written(
    kind: str,
    out: str | Path,
    parts: Mapping[str, Path],
    settings: dict[str, Any],
    force: bool,
    card: Path | None = None,
) -> Path:
    if "llm" in parts and (parts["llm"] / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{parts['llm']}: is an adapter; merge it first (src/tools/merge_lora_weights.py in "
            "MultiModalLLM), since a system's folder holds whole models."
        )
    target = output_folder(out, force=force, label="the system", inputs=parts.values())
    with atomic_folder(target, out, ConfigError) as folder:
        if card is not None:
            if "known_words" in settings:
                settings["known_words"] = Path(shutil.copy2(settings["known_words"], folder)).name
            text = f"---\npipeline_tag: any-to-any\n---\n# {target.name}\n\n`seed chat --model FOLDER` opens it.\n"
            replace_text(
                folder / "README.md", card.read_text(encoding="utf-8") if card.is_file() else text
            )
        join(kind, folder, parts, settings, whole=card is not None)
        SystemConfig.read(folder)
    return target


def join(
    kind: str,
    folder: Path,
    parts: Mapping[str, Path],
    settings: Mapping[str, Any],
    whole: bool = False,
) -> None:
    """Copy parts into a system's folder and write its `system.json`; `whole`: with files of other systems."""
    for name, source in parts.items():
        _copy(source, folder / name, whole)
    if kind == "lavit" and (folder / "llm" / VISUAL_WEIGHTS).is_file():
        (folder / "llm" / VISUAL_WEIGHTS).replace(folder / "tokenizer" / VISUAL_WEIGHTS)
    shutil.rmtree(folder / "pixels" / "decoder", ignore_errors=True)  # the part `decoder`
    for file in (folder / "sdxl" / "unet").glob("*.safetensors"):  # its weights are the adapter's
        file.unlink()
    named = {name: name for name in PARTS[kind] if (folder / name).exists()}
    if "vision" in parts and parts["vision"].is_file():  # of SEED-2's tokenizer
        named["vision"] = f"vision/{parts['vision'].name}"
    if kind == "seed_llama" and (folder / "tokenizer" / DETOKENIZER_FOLDER).is_dir():
        named = {"detokenizer": f"tokenizer/{DETOKENIZER_FOLDER}", **named}
    missing = {
        name: None for name in DECODER_PARTS if name in PARTS[kind]
    }  # the system cannot draw
    replace_text(
        folder / "system.json",
        json.dumps({**settings, "system": kind, **missing, **named}, indent=1),
    )


def _of_weights(kind: str, parts: Mapping[str, Path]) -> dict[str, Any]:
    """Settings derived from the weights."""
    sizes = {
        name: read_json_object(parts[name] / "config.json")
        for name in ("tokenizer", "llm", "decoder")
        if name in parts and (parts[name] / "config.json").is_file()
    }
    if kind == "seed_llama":
        return {
            "template": template_for(sizes.get("llm", {}).get("hidden_size")),
            "transform": dict(BICUBIC),
            "image_size": sizes.get("tokenizer", {}).get("vit", {}).get("image_size", 224),
        }
    return (
        {"head": sizes["decoder"].get("head", "highres")}
        if kind == "lavit" and "decoder" in sizes
        else {}
    )


def _copy(source: Path, place: Path, whole: bool) -> None:
    """Copy a folder's files, or one file, into the folder `place`."""
    place.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        shutil.copy2(source, place / source.name)
        return
    shutil.copytree(source, place, dirs_exist_ok=True, ignore=OF_TRAINING)
    for file in (*source.rglob("tower.json"), *source.rglob("vae.json")):
        values, key = read_json_object(file), "file" if file.name == "tower.json" else "folder"
        named, copied = (file.parent / values[key]).resolve(), place / file.relative_to(source)
        if not named.is_relative_to(source.resolve()):
            values[key] = Path(os.path.relpath(named, copied.parent.resolve())).as_posix()
            if whole:
                values[key] = f"shared_{named.name}"
                (shutil.copytree if named.is_dir() else shutil.copy2)(
                    named, copied.parent / values[key]
                )
            replace_text(copied, json.dumps(values) + "\n")
