"""The originals' names in YAML files (`_target_`), by the part that such a file describes:
`targets.yaml`."""

from __future__ import annotations

from collections.abc import Mapping

from seed_multimodal.config import read_table
from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import nearest

# Part → original names → our object, or "" (see the file).
TARGETS: dict[str, dict[str, str]] = read_table(__file__)
ALIASES = {name: target for names in TARGETS.values() for name, target in names.items() if target}


def check_target(node: Mapping[str, object], label: str, *parts: str) -> None:
    """Raise ConfigError for a `_target_` that is no original name of one of the parts."""
    names = [name for part in parts for name in TARGETS[part]]
    target = node.get("_target_")
    if target not in names:
        raise ConfigError(
            f"{label}: _target_ {target!r} is not allowed{nearest(str(target), names)}; known "
            f"are {', '.join(names)}."
        )


def arguments_of(node: Mapping[str, object]) -> JsonObject:
    """The keys of a node, without Hydra's (which begin with an underscore) at any depth."""
    arguments: JsonObject = {}
    for key, value in node.items():
        if not str(key).startswith("_"):
            arguments[str(key)] = arguments_of(value) if isinstance(value, Mapping) else value
    return arguments
