"""System folders from parts (`seed assemble`) or from a system (`save_pretrained`).

Parts are copied under their names in `system.json`, without training files.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from seed_multimodal.disk import (
    JsonObject,
    atomic_folder,
    output_folder,
    replace_text,
)
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import ADAPTER_CONFIG
from seed_multimodal.models.registry import find_family
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.pipelines.hub_files import write_hub_files
from seed_multimodal.settings import check_keys

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

    config_class = find_family(kind).config
    known_keys = ("system", *config_class.settings(), *config_class.parts())
    check_keys(settings or {}, known_keys, "--settings")
    config_class.locate_parts(paths)
    all_settings = {**config_class.settings_of_weights(paths), **(settings or {})}
    return _write_system(config_class, out, paths, all_settings, force)


def save_system(config: SystemConfig, out: str | Path, *, force: bool = False) -> Path:
    """Write a system with a model card; missing parts are skipped."""
    parts = config.parts_to_save()
    settings: JsonObject = {}
    for key in config.settings():
        value = getattr(config, key)
        if value is not None:
            settings[key] = dataclasses.asdict(value) if key == "tasks" else value
    card = Path(config.name) / "README.md"
    return _write_system(type(config), out, parts, settings, force, card=card)


def _write_system(
    config_class: type[SystemConfig],
    out: str | Path,
    parts: Mapping[str, Path],
    settings: JsonObject,
    force: bool,
    card: Path | None = None,
) -> Path:
    """Write a system's folder, complete or not at all.

    card: of a saved system, in whose folder its known words are, too.
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
        join(config_class, folder, parts, settings)
        SystemConfig.read(folder)
    return target


def join(
    config_class: type[SystemConfig],
    folder: Path,
    parts: Mapping[str, Path],
    settings: JsonObject,
) -> None:
    """Copy parts into a system's folder, and write its `system.json` and transformers' files."""
    # 1. The files.
    for name, source in parts.items():
        _copy(source, folder / name)

    # 2. Their names; without decoder parts (null) the system cannot draw.
    names: dict[str, str | None] = dict.fromkeys(config_class.decoder_parts())
    for name in config_class.parts():
        if (folder / name).exists():
            names[name] = name
    config_class.arrange(folder, names)
    content = json.dumps({**settings, "system": config_class.system, **names}, indent=1)
    replace_text(folder / "system.json", content)
    write_hub_files(config_class, folder)


def _copy(source: Path, target: Path) -> None:
    """Copy a folder's files, or one file, into the folder `target`."""
    target.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        shutil.copy2(source, target / source.name)
        return
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=TRAINING_FILES)
