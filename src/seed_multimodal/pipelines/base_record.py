"""`base.json` of a language model's checkpoint: the system and the parts that it was trained with.

Checkpoints of PEFT, such as the original SEED-LLaMA's, have none; they name the language model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seed_multimodal import hub
from seed_multimodal.disk import read_json_object, replace_text
from seed_multimodal.errors import ConfigError
from seed_multimodal.models.registry import families, find_family
from seed_multimodal.settings import check_keys, check_value

BASE = "base.json"
DEFAULT_FAMILY = "seed_llama"  # of a checkpoint of PEFT, and of a system.json without `system`


def record_base(folder: Path, system: str, **parts: str | Path | None) -> None:
    """Write a checkpoint's `base.json`: the system's kind, and the parts that it was trained with.

    Paths below the repository are relative to its root.
    """
    paths = {key: hub.portable_path(path) for key, path in parts.items() if path is not None}
    replace_text(folder / BASE, json.dumps({"system": system, **paths}, indent=1) + "\n")


def read_base(folder: Path) -> dict[str, str]:
    """A checkpoint's `base.json`, or the same from the configuration of PEFT's adapter.

    Raises ConfigError: a wrong file.
    """
    file = folder / BASE
    if file.is_file():
        record = read_json_object(file, ConfigError)
        kind = family_name(record.get("system"), f"{file}: system")
        check_keys(record, ("system", *find_family(kind).config.parts()), str(file))
        paths: dict[str, str] = check_value(dict[str, str], record, str(file))
        return paths

    file = folder / hub.ADAPTER_CONFIG
    base = read_json_object(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or is_lost(base):
        raise ConfigError(
            f"{file}: base_model_name_or_path is {base!r}: name there the base model that the "
            "checkpoint was trained on, or merge it with --base_model "
            "(MultiModalLLM/src/tools/merge_lora_weights.py)."
        )
    return {"system": DEFAULT_FAMILY, "llm": base}


def is_lost(name: str) -> bool:
    """Whether a model is an absolute path that does not exist; other names may be the hub's."""
    return Path(name).is_absolute() and not Path(name).exists()


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a language model's training."""
    return (folder / BASE).is_file() or (folder / hub.ADAPTER_CONFIG).is_file()


def family_name(value: Any, label: str) -> str:
    """The name of a family. Raises ConfigError: another value, prefixed with `label`."""
    name: str = check_value(str, value, label, choices=[spec.name for spec in families()])
    return name
