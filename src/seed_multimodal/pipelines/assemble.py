"""System folders from parts (`seed assemble`) or from a system (`save_pretrained`).

Parts are copied under their names in `system.json`, without training files; `tower.json` and
`vae.json`, which refer to files of other systems, are rewritten.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from seed_multimodal.disk import (
    JsonObject,
    atomic_folder,
    output_folder,
    read_json_object,
    replace_text,
)
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import ADAPTER_CONFIG, VISUAL_WEIGHTS
from seed_multimodal.language.prompts import template_for
from seed_multimodal.pipelines.config import (
    BICUBIC,
    COMMON,
    DECODER_PARTS,
    DETOKENIZER_FOLDER,
    PARTS,
    SETTINGS,
    SystemConfig,
)

TRAINING_FILES = shutil.ignore_patterns(
    "optimizer*", "trainer_state.json", "data_state.json", "ema.safetensors", "manifest.json", ".*"
)


def assemble_system(
    kind: str,
    out: str | Path,
    parts: Mapping[str, str | Path],
    settings: JsonObject | None = None,
    *,
    force: bool = False,
) -> Path:
    """Create a system folder from its `parts`; `settings` override the derived ones."""
    paths = {name: Path(source).expanduser() for name, source in parts.items()}
    for name, path in paths.items():
        if not path.exists():
            raise CheckpointError(f"{path}: no such folder for --{name}.")

    # LaVIT: an export has tokenizer and decoder, a trained pixel decoder its decoder.
    if kind == "lavit":
        exported = paths["tokenizer"]
        for folder in (paths.get("pixels", exported), exported):
            if (folder / "decoder").is_dir():
                paths.setdefault("decoder", folder / "decoder")
        if (exported / "tokenizer").is_dir():
            paths["tokenizer"] = exported / "tokenizer"

    all_settings = {**_settings_of_weights(kind, paths), **(settings or {})}
    return _write_system(kind, out, paths, all_settings, force)


def save_system(config: SystemConfig, out: str | Path, *, force: bool = False) -> Path:
    """Write a system with a model card as one self-contained folder; missing parts are skipped."""
    if config.original == "lavit":
        raise ConfigError(
            f"{config.name}: its parts are one folder in the original's layout already; copy that."
        )
    kind = config.system
    parts: dict[str, Path] = {}
    for key in PARTS[kind]:
        path = getattr(config, key)
        if path and config.has(key):
            parts[key] = path
    if kind == "seed_llama" and "detokenizer" in parts:
        if parts["detokenizer"].parent == parts["tokenizer"]:
            del parts["detokenizer"]  # copied with the tokenizer

    settings: JsonObject = {}
    for key in (*COMMON, *SETTINGS[kind]):
        value = getattr(config, key)
        if value is not None:
            settings[key] = dataclasses.asdict(value) if key == "tasks" else value
    return _write_system(kind, out, parts, settings, force, card=Path(config.name) / "README.md")


def _write_system(
    kind: str,
    out: str | Path,
    parts: Mapping[str, Path],
    settings: JsonObject,
    force: bool,
    card: Path | None = None,
) -> Path:
    """Write a system's folder, complete or not at all.

    card: README of a self-contained system, to which files of other systems are copied, too.
    """
    if "llm" in parts and (parts["llm"] / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{parts['llm']}: is an adapter; merge it first (src/tools/merge_lora_weights.py in "
            "MultiModalLLM), since a system's folder holds whole models."
        )
    target = output_folder(out, force=force, label="the system", inputs=parts.values())
    with atomic_folder(target, out, ConfigError) as folder:
        # 1. The card, and the settings' file next to it.
        if card is not None:
            if "known_words" in settings:
                settings["known_words"] = Path(shutil.copy2(settings["known_words"], folder)).name
            readme = (
                f"---\npipeline_tag: any-to-any\n---\n# {target.name}\n\n"
                "`seed chat --model FOLDER` opens it.\n"
            )
            if card.is_file():
                readme = card.read_text(encoding="utf-8")
            replace_text(folder / "README.md", readme)

        # 2. The parts; a wrong setting is reported before the folder gets its name.
        join(kind, folder, parts, settings, self_contained=card is not None)
        SystemConfig.read(folder)
    return target


def join(
    kind: str,
    folder: Path,
    parts: Mapping[str, Path],
    settings: JsonObject,
    self_contained: bool = False,
) -> None:
    """Copy parts into a system's folder and write its `system.json`.

    self_contained: also copy files of other systems that the parts refer to.
    """
    # 1. The files.
    for name, source in parts.items():
        _copy(source, folder / name, self_contained)
    if kind == "lavit" and (folder / "llm" / VISUAL_WEIGHTS).is_file():
        (folder / "llm" / VISUAL_WEIGHTS).replace(folder / "tokenizer" / VISUAL_WEIGHTS)
    shutil.rmtree(folder / "pixels" / "decoder", ignore_errors=True)  # the part `decoder`
    for file in (folder / "sdxl" / "unet").glob("*.safetensors"):  # its weights are the adapter's
        file.unlink()

    # 2. Their names; without decoder parts (null) the system cannot draw.
    names: dict[str, str | None] = {name: None for name in DECODER_PARTS if name in PARTS[kind]}
    if kind == "seed_llama" and (folder / "tokenizer" / DETOKENIZER_FOLDER).is_dir():
        names["detokenizer"] = f"tokenizer/{DETOKENIZER_FOLDER}"
    for name in PARTS[kind]:
        if (folder / name).exists():
            names[name] = name
    if "vision" in parts and parts["vision"].is_file():  # of SEED-2's tokenizer
        names["vision"] = f"vision/{parts['vision'].name}"
    content = json.dumps({**settings, "system": kind, **names}, indent=1)
    replace_text(folder / "system.json", content)


def _settings_of_weights(kind: str, parts: Mapping[str, Path]) -> JsonObject:
    """Settings derived from the weights."""
    sizes: dict[str, JsonObject] = {}
    for name in ("tokenizer", "llm", "decoder"):
        if name in parts and (parts[name] / "config.json").is_file():
            sizes[name] = read_json_object(parts[name] / "config.json")

    # The template of a 14B differs; preprocessing is that of the tokenizer's training.
    if kind == "seed_llama":
        return {
            "template": template_for(sizes.get("llm", {}).get("hidden_size")),
            "transform": dict(BICUBIC),
            "image_size": sizes.get("tokenizer", {}).get("vit", {}).get("image_size", 224),
        }
    if kind == "lavit" and "decoder" in sizes:
        return {"head": sizes["decoder"].get("head", "highres")}
    return {}


def _copy(source: Path, target: Path, self_contained: bool) -> None:
    """Copy a folder's files, or one file, into the folder `target`."""
    target.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        shutil.copy2(source, target / source.name)
        return
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=TRAINING_FILES)

    # Paths of files outside of the part are relative to the file that names them.
    for file in (*source.rglob("tower.json"), *source.rglob("vae.json")):
        key = "file" if file.name == "tower.json" else "folder"
        reference = read_json_object(file)
        outside = (file.parent / reference[key]).resolve()
        copied = target / file.relative_to(source)
        if outside.is_relative_to(source.resolve()):
            continue
        if not self_contained:
            relative = os.path.relpath(outside, copied.parent.resolve())
            reference[key] = Path(relative).as_posix()
        else:
            reference[key] = f"shared_{outside.name}"
            if outside.is_dir():
                shutil.copytree(outside, copied.parent / reference[key])
            else:
                shutil.copy2(outside, copied.parent / reference[key])
        replace_text(copied, json.dumps(reference) + "\n")
