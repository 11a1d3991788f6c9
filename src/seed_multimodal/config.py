"""YAML configurations: objects built from `_target_`, restricted to this package.

A `_target_` is a name of `compat.targets.ALIASES` (the original repositories' dotted names), or a
public function or class of this package; it is called with the node's other keys.
`${oc.env:PROJECT_ROOT}` is the folder with `.project-root`.
"""

from __future__ import annotations

import inspect
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.settings import check_keys, check_value, nearest

PREFIX = "seed_multimodal."
ALIASES = "targets:ALIASES"  # the originals' names → ours, of `compat`
# Keys of a node that are no arguments of its target; the last two are Hydra's.
_RESERVED = ("_target_", "_recursive_", "_convert_")


def from_compat(name: str) -> Any:
    """An object of `compat`, "module:object".

    `compat` is above all other packages. They translate files of the originals by this function
    alone, when they meet one.
    """
    return pkgutil.resolve_name(f"{PREFIX}compat.{name}")


def project_root(start: str | Path | None = None) -> Path:
    """The nearest folder with a `.project-root` file, upwards from `start`, the working directory
    or this file, in this order; else the working directory."""
    for origin in (start, Path.cwd(), Path(__file__)):
        path = Path(origin or ".").resolve()
        for folder in (path, *path.parents):
            if (folder / ".project-root").is_file():
                return folder
    return Path.cwd()


def project_path(path: str | Path) -> Path:
    """A path as is, else below the project root or its parents; unchanged if it does not exist."""
    path = Path(path).expanduser()
    root = project_root()
    candidates = [path, *(folder / path for folder in (root, *root.parents))]
    return next((candidate for candidate in candidates if candidate.exists()), path)


def load_yaml(path: str | Path) -> DictConfig:
    """A YAML mapping with its interpolations resolved.

    Raises ConfigError: missing, not readable, or an interpolation that fails.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{file}: no such configuration file.")
    return resolve(read_yaml(file), file)


def read_table(file: str | Path) -> Any:
    """The content of a YAML file of this package or of a family, or of that next to a module."""
    text = Path(file).with_suffix(".yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # that of C is ten times as fast
    return yaml.load(text, Loader=loader)


def resolve(config: DictConfig, file: Path) -> DictConfig:
    """Resolve interpolations in place; `${oc.env:PROJECT_ROOT}` is the root above `file`. Raises
    ConfigError."""
    with project_root_variable(file.parent):
        try:
            OmegaConf.resolve(config)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{file}: {first_line(error)}") from error
    return config


@contextmanager
def project_root_variable(folder: Path) -> Iterator[None]:
    """Context with the environment variable PROJECT_ROOT, which OmegaConf reads while it resolves;
    afterwards it is as the user set it."""
    set_by_user = os.environ.get("PROJECT_ROOT")
    os.environ["PROJECT_ROOT"] = set_by_user or str(project_root(folder))
    try:
        yield
    finally:
        if set_by_user is None:
            del os.environ["PROJECT_ROOT"]


def read_yaml(file: Path) -> DictConfig:
    """A YAML mapping, its interpolations unresolved. Raises ConfigError: not readable, not YAML, or
    not a mapping."""
    try:
        config = OmegaConf.load(file)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{file}: not readable as YAML ({first_line(error)}).") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{file}: must contain a mapping of keys to values.")
    return config


def instantiate(config: Mapping[str, object] | str | Path, /, **overrides: object) -> Any:
    """Call the `_target_` of a configuration with its keys, nested nodes first.

    config: a node, or a YAML file.
    overrides: replace keys of the top node.

    Raises ConfigError: no `_target_`, one not allowed, unknown or missing keys.
    """
    label = "configuration"
    if isinstance(config, str | Path):
        label = str(config)
        config = load_yaml(config)
    if "_target_" not in config:
        raise ConfigError(f"{label}: has no _target_, so there is nothing to build.")
    node: dict[Any, object] = {**config, **overrides}
    return _build(node, label)


def as_mapping(value: object, label: str) -> dict[str, Any]:
    """A value that must be a mapping, interpolations resolved. Raises ConfigError."""
    if isinstance(value, DictConfig):
        value = OmegaConf.to_container(value, resolve=True)
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{label}: must be a mapping of keys to values, not a {type(value).__name__}."
        )
    return {str(key): item for key, item in value.items()}


def find_target(name: str, label: str = "configuration") -> Callable[..., Any]:
    """The callable behind a `_target_`.

    label: prefix of error messages.

    Raises ConfigError: neither an alias nor a public object of this package.
    """
    aliases: Mapping[str, str] = from_compat(ALIASES)
    full_name = aliases.get(name, name).replace(":", ".")
    if not full_name.startswith(PREFIX):
        raise ConfigError(
            f"{label}: _target_ {name!r} is not allowed{nearest(name, aliases)}: a configuration "
            f"may only build objects of {PREFIX.rstrip('.')}."
        )
    try:
        target = pkgutil.resolve_name(full_name)
    except (AttributeError, ValueError):
        target = None
    # Private names, and names that a module imports (os, torch, …), are not allowed.
    is_public = "._" not in full_name
    is_defined_here = str(getattr(target, "__module__", "")).startswith(PREFIX)
    if not (is_public and callable(target) and is_defined_here):
        raise ConfigError(f"{label}: _target_ {name!r} is not a function or class of this package.")
    return target


def _build(value: object, label: str) -> Any:
    """A value of a configuration, with everything below it that has a `_target_` built."""
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, list):
        return [_build(item, f"{label}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return check_value(Any, value, label)

    # Nested nodes first: they are the arguments of this one.
    arguments = {
        key: _build(item, f"{label}: {key}") for key, item in value.items() if key not in _RESERVED
    }
    if "_target_" not in value:
        return arguments

    # A wrong key is reported before the call, whose TypeError would not name the file.
    target = find_target(str(value["_target_"]), label)
    signature = inspect.signature(target)
    parameters = signature.parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        check_keys(arguments, parameters, label)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{label}: {value['_target_']}: {error}.") from None
    return target(**arguments)


def with_values(item: Any, values: Mapping[str, object]) -> Any:
    """A text, or the texts of lists and mappings, with values in place of their names in braces."""
    if isinstance(item, dict):
        return {key: with_values(inner, values) for key, inner in item.items()}
    if isinstance(item, list):
        return [with_values(inner, values) for inner in item]
    if isinstance(item, str):
        for name, value in values.items():
            item = item.replace(f"{{{name}}}", str(value))
    return item
