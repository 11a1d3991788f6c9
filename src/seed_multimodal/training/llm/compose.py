"""The configuration of a run, composed by Hydra from `configs/train.yaml`, its groups, and what the user typed.

`compose` takes an argument list and gives one resolved mapping. The groups are model, data, optim, trainer,
tokenizer, deepspeed (the original's JSON files), eval_data (files of data), and of SEED-X visual_encoder and agent;
each takes the name of one of its configurations or the path of any file (`model=configs/model/vicuna_7b_lora.yaml`). A
primary configuration may choose files by the key `files` instead of Hydra's defaults.
A dotted override may set a key that no file wrote; the reader of the settings refuses unknown keys and names the
nearest. Hydra only composes: it changes no folder, logs nothing and calls nothing, and `_target_`s are looked up in the
alias tables only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seed_multimodal.config import load_yaml, project_root, read_yaml
from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.settings import check_keys, nearest
from seed_multimodal.training.llm.flags import translate
from seed_multimodal.training.llm.model_settings import find_folder
from seed_multimodal.training.llm.trainer_settings import KEYS

SEED_X_GROUPS = ("visual_encoder", "agent")
GROUPS = ("model", "data", "optim", "trainer", "tokenizer", "deepspeed", "eval_data", *SEED_X_GROUPS)
FOLDERS = {"eval_data": "data", "agent": "clm_models"}  # a group's files lie in another's folder
_PLUGIN, _PLUGIN_FILE = "accelerate.DeepSpeedPlugin", "hf_ds_config"  # SEED-X's way to name DeepSpeed's json
_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass
class Composed:
    """A resolved configuration, with remarks for the user."""

    config: dict[str, Any]
    remarks: list[str] = field(default_factory=list)


def compose(arguments: Sequence[str], folder: str | Path, name: str = "train", *, whole: bool = True) -> Composed:
    """Flags and overrides → the resolved configuration.

    Args:
        arguments: overrides (`trainer.max_steps=10`, `model=NAME|FILE`) and flags of the original command line.
        folder: holds `NAME.yaml` and a folder per group.
        whole: every value must be there; else one that is needed and not given stays `???`.

    Raises:
        ConfigError: an unknown flag, group, configuration or override, or a file that cannot be read.
    """
    from omegaconf import OmegaConf

    home = Path(folder).resolve()
    if not (home / f"{name}.yaml").is_file():
        raise ConfigError(f"{home / name}.yaml: there is no such configuration file (--config-path, --config-name).")
    given = translate(arguments)
    choices, values = dict(given.groups), dict(given.values)
    chosen_before = load_yaml(home / f"{name}.yaml").get("files") or {}
    overrides: list[str] = []
    for place, word in zip(given.rest_places, given.rest, strict=True):
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            raise ConfigError(f"{word!r} is neither an option (--name) nor an override (key=value).")
        _known(key)
        bare = key.lstrip("+~")
        for set_before in [k for k in values if k == bare or (key in GROUPS and k.startswith(f"{key}."))]:
            if given.places[set_before] < place:  # what comes later wins
                del values[set_before]
        if key in GROUPS:
            if given.places.get(key, -1) < place:
                choices[key] = value
        else:
            overrides.append(_readable(word))
    if given.original:  # what the command line leaves out has transformers' defaults, as in the original
        for group in ("optim", "trainer"):
            special = home / group / f"{name}_original.yaml"
            choices.setdefault(group, special.stem if special.is_file() else "original")
    for group, file in chosen_before.items():
        choices.setdefault(str(group), str(file))
    config = _composed(home, name, choices, overrides)
    config.pop("files", None)
    for key, value in values.items():
        OmegaConf.update(config, key, value, force_add=True)
    return Composed(_resolved(config, home, whole), given.remarks)


def _known(key: str) -> None:
    top = key.lstrip("+~").partition(".")[0]
    if top not in (*KEYS, *GROUPS):
        raise ConfigError(f"{key}: unknown key{nearest(top, KEYS)}; an override begins with one of {', '.join(KEYS)}.")


def _readable(word: str) -> str:
    """An override as Hydra takes it; what its grammar cannot read is refused by name."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    override = word if word[0] in "+~" else f"++{word}"
    try:
        OverridesParser.create().parse_overrides([override])
    except HydraException as error:
        key, _, value = word.partition("=")
        quoted = value.replace('"', '\\"')
        raise ConfigError(f"{word!r} cannot be read as an override; a value with signs like = ( ) ' needs quotes of "
                          f"its own, beside the shell's: '{key}=\"{quoted}\"'.") from error
    return override


def _composed(home: Path, name: str, choices: dict[str, str], overrides: list[str]) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    selected = []
    for group, choice in choices.items():
        if choice in ("", "none", "null", "None"):
            if group not in ("deepspeed", "eval_data"):
                raise ConfigError(f"{group}={choice}: a configuration is needed.")
            selected.append(f"~{group}" if group in _defaults(home, name) else "")
            continue
        # A node of our own for every choice: files anywhere, JSON, and folders of a tokenizer become like the others.
        node = _load(home, group, choice)
        ConfigStore.instance().store(group=group, name="chosen", node=OmegaConf.create(node))
        selected.append(f"{group}=chosen" if group in _defaults(home, name) else f"+{group}=chosen")
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(home)):
            config = hydra_compose(config_name=name, overrides=[*filter(None, selected), *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_sentence(error)) from error
    OmegaConf.set_struct(config, False)
    return config


def _defaults(home: Path, name: str) -> list[str]:
    """Groups that the primary configuration selects something of."""
    entries = load_yaml(home / f"{name}.yaml").get("defaults") or []
    return [str(key) for entry in entries if not isinstance(entry, str) for key in entry]


def group_folder(home: Path, group: str) -> Path:
    """Where a group's files lie: below the configurations, or beside them (DeepSpeed's, for all applications)."""
    folder = FOLDERS.get(group, group)
    return next((place / folder for place in (home, home.parent) if (place / folder).is_dir()), home / folder)


def _load(home: Path, group: str, choice: str) -> dict[str, Any]:
    """The content of a group's configuration by its name or a file's path."""
    folder = group_folder(home, group)
    named = [folder / f"{choice}{suffix}" for suffix in ("", *_SUFFIXES)]
    ours = choice.removeprefix("SEED-X/")  # which stands before the original's names of files
    places = [Path(choice), *named, *(folder / ours for folder in (Path(), home.parent, home.parent.parent))]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        if group == "tokenizer" and (find_folder(choice) / "tokenizer.model").is_file():
            return {"pretrained_model_name_or_path": choice}
        names = sorted(path.stem for path in folder.glob("*") if path.suffix in _SUFFIXES)
        raise ConfigError(f"{group}={choice}: there is no such file and no such configuration in {folder}"
                          f"{nearest(Path(choice).stem, names)}; it has {', '.join(names) or 'none'}.")
    if file.suffix != ".json":
        node = _unresolved(file)
        if "defaults" in node:
            raise ConfigError(f"{file}: a group's configuration must not have a defaults list.")
        if node.get("_target_") != _PLUGIN:
            return node
        check_keys(node, ("_target_", _PLUGIN_FILE), str(file))
        return _load(home, group, str(node.get(_PLUGIN_FILE)))
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file}: not readable as JSON ({first_line(error)}).") from error
    if not isinstance(read, dict):
        raise ConfigError(f"{file}: must hold a mapping of keys to values.")
    return read


def _unresolved(file: Path) -> dict[str, Any]:
    """A YAML mapping with its interpolations as they are."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(read_yaml(file), resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _resolved(config: Any, home: Path, whole: bool) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    set_by_user = os.environ.get("PROJECT_ROOT")
    os.environ["PROJECT_ROOT"] = set_by_user or str(project_root(home))
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=whole)
    except OmegaConfBaseException as error:
        raise ConfigError(f"configuration: {_sentence(error)}") from error
    finally:
        if set_by_user is None:
            del os.environ["PROJECT_ROOT"]
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if "MissingMandatoryValue" in type(error).__name__ or text.startswith("Missing mandatory value"):
        return f"{text.rpartition(':')[2].strip()} is needed."
    return text if text.endswith(".") else f"{text}."
