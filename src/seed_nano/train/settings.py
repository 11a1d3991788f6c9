"""Settings of a pipeline: `presets/SYSTEM/defaults.yaml`, then a preset or a file, then `key=value` overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, make_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from seed_multimodal.config import read_yaml
from seed_multimodal.disk import replace_text
from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.settings import read_settings, setting
from seed_multimodal.training.loop_settings import StageSettings

PRESETS = Path(__file__).resolve().parents[1] / "presets"
SIZES = {  # system -> (size, what it must be a multiple of: a number or other sizes, whose product counts)
    "nano": (("image_size", 16), ("image_size", "clip.patch"), ("vae.channels", "vae.groups"), ("unet.channels", 8),
             ("clip.width", "clip.heads"), ("tokenizer.hidden", "tokenizer.heads"), ("llm.width", 2, "llm.heads")),
    "nano_x": (("tower.features", 4), ("tower.features", "tower.pool_heads"), ("unet.dim", "unet.heads"),
               ("unet.prompt", 2), ("unet.channels", 8), ("layout.hidden", 8), ("llm.width", 4, "llm.heads")),
    "nano_lavit": (("unet.channels", 8), ("layout.hidden", 8), ("llm.width", 2, "llm.heads")),
}


def load_settings(system: str, file: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The settings of a system, a dataclass with the fields of its defaults.yaml.

    Args:
        file: a YAML file, or the name of a preset.

    Raises:
        ConfigError: missing file, unknown key (the nearest is named), wrong type, sizes that do not fit together.
    """
    path = Path(file) if str(file).endswith(".yaml") else PRESETS / system / f"{file}.yaml"
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such settings file.")
    defaults: Any = OmegaConf.to_container(read_yaml(PRESETS / system / "defaults.yaml"))
    kind = _settings_type(system, defaults)
    try:
        values = OmegaConf.merge(asdict(kind()), read_yaml(path), OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{path}: {first_line(error)}.") from error
    assert isinstance(values, DictConfig)
    settings = read_settings(kind, values, str(path))
    for size, *factors in SIZES[system]:
        unit = 1
        for factor in factors:
            unit *= factor if isinstance(factor, int) else OmegaConf.select(values, str(factor))
        sizes = OmegaConf.select(values, str(size))
        for value in [sizes] if isinstance(sizes, int) else sizes or [0]:
            if value < 1 or value % unit:
                why = ", ".join(map(str, factors))
                raise ConfigError(f"{size} must be a multiple of {unit} ({why}), not {value}.")
    return settings


def save_settings(settings: Any, file: Path) -> None:
    """Write resolved settings as YAML."""
    replace_text(file, OmegaConf.to_yaml(OmegaConf.create(asdict(settings))))


def _settings_type(name: str, defaults: Mapping[str, Any]) -> type[Any]:
    """The dataclass of which `defaults` is an instance; `train_*` are `StageSettings`, numbers are not negative."""
    fields: list[Any] = []
    for key, value in defaults.items():
        if key.startswith("train_"):
            fields.append((key, StageSettings, field(default_factory=partial(StageSettings, **value))))
        elif isinstance(value, Mapping):
            kind = _settings_type(f"{name}.{key}", value)
            fields.append((key, kind, field(default_factory=kind)))
        elif isinstance(value, list):
            fields.append((key, list[int], setting(factory=partial(list, value), least=1)))
        elif value is None:
            fields.append((key, bool | None, None))
        else:
            least = 0 if isinstance(value, int | float) and not isinstance(value, bool) else None
            fields.append((key, type(value), setting(value, least=least)))
    return make_dataclass(name, fields)
