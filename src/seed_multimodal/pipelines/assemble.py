"""System folders from parts (`seed assemble`) or from a system (`save_pretrained`).

Parts are copied under their names in `system.json`, without training files.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from seed_multimodal.disk import (
    JsonObject,
    atomic_folder,
    output_folder,
    replace_json,
    replace_text,
)
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.models.registry import find_family
from seed_multimodal.pipelines.config import SYSTEM, SystemConfig
from seed_multimodal.settings import check_keys
from seed_multimodal.weights.catalogue import ADAPTER_CONFIG

# The module by which transformers loads a folder (`trust_remote_code=True`).
REMOTE_CODE = Path(__file__).with_name("modeling_seed_multimodal.py")
PROCESSOR_CONFIG = "processor_config.json"
# Files of a checkpoint that belong to its training.
TRAINING_FILES = shutil.ignore_patterns(
    "optimizer*",
    "trainer_state.json",
    "data_state.json",
    "trained.safetensors",
    "manifest.json",
    SYSTEM,
    ".*",
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
    all_settings = {**config_class.settings_of_weights(paths), **(settings or {})}
    return _write_system(config_class, out, paths, all_settings, force)


def save_system(config: SystemConfig, out: str | Path, *, force: bool = False) -> Path:
    """Write a system with a model card; missing parts are skipped."""
    parts, settings = config.parts_to_save(), config.settings_to_save()
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
    config_class: type[SystemConfig], folder: Path, parts: Mapping[str, Path], settings: JsonObject
) -> None:
    """Copy parts into a system's folder, and write its `system.json` and transformers' files."""
    # 1. The files; a single one as a folder with it.
    for name, source in parts.items():
        if source.is_file():
            (folder / name).mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
        else:
            shutil.copytree(source, folder / name, dirs_exist_ok=True, ignore=TRAINING_FILES)

    # 2. Their names; without decoder parts (null) the system cannot draw.
    names: dict[str, str | None] = dict.fromkeys(config_class.decoder_parts())
    for name in config_class.parts():
        if (folder / name).exists():
            names[name] = name
    config_class.arrange(folder, names)
    replace_json(folder / SYSTEM, {**settings, "system": config_class.system, **names})
    write_hub_files(config_class, folder)


def write_hub_files(config_class: type[SystemConfig], folder: Path) -> None:
    """Write `config.json`, `processor_config.json` and the module by which transformers loads a
    system."""
    name = find_family(config_class.system).system_name
    model = f"{name}ForConditionalGeneration"
    module = REMOTE_CODE.stem
    config = {
        "model_type": config_class.system,
        "architectures": [model],
        "auto_map": {
            "AutoConfig": f"{module}.{name}Config",
            "AutoModelForMultimodalLM": f"{module}.{model}",
        },
    }
    replace_json(folder / "config.json", config)
    write_processor(f"{name}Processor", folder)


def write_processor(class_name: str, folder: Path, **keys: str) -> None:
    """Write `processor_config.json`, with further keys, and the module that it names."""
    auto_map = {"AutoProcessor": f"{REMOTE_CODE.stem}.{class_name}"}
    content = {"processor_class": class_name, "auto_map": auto_map, **keys}
    replace_json(folder / PROCESSOR_CONFIG, content)
    shutil.copyfile(REMOTE_CODE, folder / REMOTE_CODE.name)
