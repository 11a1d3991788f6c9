"""Typed settings: a dataclass filled from a mapping (YAML, JSON, keyword arguments), every value checked.

    @dataclass
    class Example:
        steps: int = setting(least=1)                       # needed, at least 1
        lr: float = setting(1e-4, above=0)
        precision: str = setting("bf16", choices=("bf16", "fp16", "fp32"))
        files: list[str] = setting(factory=list)

    read_settings(Example, {"steps": 100, "lr": 3e-4}, "trainer")

An unknown key is an error that names the nearest one; so is a value of another type or outside its range. The ranges
stand at the fields, so a class documents its limits; conditions on several fields are checked by the class's
`__post_init__` or its reader.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from seed_multimodal.errors import ConfigError, first_line

T = TypeVar("T")
SEEDS: dict[str, Any] = {"least": -2**63, "most": 2**64 - 1}  # limits of the seeds that torch's generators take


def setting(default: Any = dataclasses.MISSING, *, factory: Callable[[], Any] | None = None, least: float | None = None,
            above: float | None = None, most: float | None = None, below: float | None = None,
            choices: Sequence[Any] | None = None) -> Any:
    """A dataclass field with limits: `least <= value <= most`, `above < value < below`, one of `choices`.

    Limits hold for each item of a list; None is never compared. Infinity is refused, but with `most=math.inf`.
    """
    limits = {name: limit for name, limit in (("least", least), ("above", above), ("most", most), ("below", below),
                                              ("choices", choices)) if limit is not None}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=limits)
    return dataclasses.field(default=default, metadata=limits)


def read_settings(kind: type[T], values: Mapping[str, Any] | DictConfig, where: str) -> T:
    """An instance of the dataclass `kind` out of a mapping.

    An int serves as a float, a str as a Path, a mapping as a nested dataclass; no other conversion is made.

    Args:
        where: what the mapping is, as errors begin: `trainer`, `configs/x.yaml`.

    Raises:
        ConfigError: an unknown key (the nearest is named), a missing one, a value of another type or out of range, an
            interpolation that fails.
    """
    try:
        plain: Any = OmegaConf.to_container(values, resolve=True) if isinstance(values, DictConfig) else values
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {first_line(error)} (key {getattr(error, 'full_key', '?')}).") from error
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{where}: must be a mapping of keys to values, not {plain!r}.")
    known = {entry.name: entry for entry in dataclasses.fields(kind) if entry.init}  # type: ignore[arg-type]
    check_keys([str(key) for key in plain], known, where)
    hints = get_type_hints(kind)
    typed = {str(key): _typed(hints[str(key)], value, f"{where}: {key}") for key, value in plain.items()}
    for name, entry in known.items():
        if name in typed:
            _check_limits(entry.metadata, typed[name], f"{where}: {name}")
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: {name} is needed.")
    return kind(**typed)


def check_settings(settings: Any, where: str) -> None:
    """Refuse a dataclass made in code whose values `read_settings` would refuse.

    Raises:
        ConfigError: as `read_settings`.
    """
    hints = get_type_hints(type(settings))
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if dataclasses.is_dataclass(value):
            check_settings(value, f"{where}: {entry.name}")
            continue
        _typed(hints[entry.name], value, f"{where}: {entry.name}")
        _check_limits(entry.metadata, value, f"{where}: {entry.name}")


def check_value(hint: Any, value: Any, where: str, **limits: Any) -> Any:
    """One value given in code, as `read_settings` would take it for a field of type `hint`.

    Args:
        limits: as of `setting`.

    Raises:
        ConfigError: another type, or out of range.
    """
    typed = _typed(hint, value, where)
    _check_limits(limits, typed, where)
    return typed


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse the first key of `given` that is not in `known`, naming the nearest that is.

    Raises:
        ConfigError: an unknown key.
    """
    options = list(known)
    for key in given:
        if key not in options:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(key, options)}; "
                              f"known keys are {', '.join(sorted(options)) or 'none'}.")


def nearest(key: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest known key, or an empty string."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], silent: Sequence[str] = ()) -> list[str]:
    """`key: before -> now` for each setting in which two resolved configurations differ, in alphabetical order.

    Args:
        silent: dotted keys that may differ; all below such a key is silent, too.
    """
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return [f"{key}: {_shown(old, key)} -> {_shown(new, key)}" for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not any(key == one or key.startswith(f"{one}.") for one in silent)]


def _typed(hint: Any, value: Any, where: str) -> Any:
    """`value` as an instance of the type, or a ConfigError."""
    union = get_origin(hint) in (Union, types.UnionType)
    options = get_args(hint) if union else (hint,)
    if hint is Any or (value is None and type(None) in options):
        return value
    for option in options:
        found, made = _as_one(option, value, where)
        if found:
            return made
    names = " or ".join(dict.fromkeys(_name(option) for option in options if option is not type(None)))
    raise ConfigError(f"{where} must be {names}, not {value!r}.")


def _as_one(option: Any, value: Any, where: str) -> tuple[bool, Any]:
    """(whether `value` fits this type, the value in it)."""
    origin, inner = get_origin(option), get_args(option)
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)  # numpy's, too
    if option is Any:
        return True, value
    if origin is Literal:
        return isinstance(value, tuple(map(type, inner))) and value in inner, value
    if origin in (list, Sequence, tuple):
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            return False, None
        open_end = origin is not tuple or inner[-1] is Ellipsis
        if not open_end and len(value) != len(inner):
            return False, None
        items = [_typed(inner[0 if open_end else i], one, f"{where}[{i}]") for i, one in enumerate(value)]
        return True, tuple(items) if origin is tuple else items
    if origin in (dict, Mapping) or option in (dict, Mapping):
        fits = isinstance(value, Mapping)
        return fits, {str(key): _typed(inner[1] if inner else Any, one, f"{where}.{key}")
                      for key, one in value.items()} if fits else None
    if dataclasses.is_dataclass(option):
        if isinstance(value, Mapping):
            return True, read_settings(option, value, where)  # type: ignore[arg-type]
        return isinstance(value, option), value  # type: ignore[arg-type]
    if option is float:
        try:
            return number, float(value) if number else None
        except OverflowError:  # a whole number beyond all floats
            return True, math.inf
    if option is int:
        whole = number and isinstance(value, numbers.Integral)
        return whole, int(value) if whole else None
    if option is Path:
        return isinstance(value, str | Path) and bool(str(value)), Path(value) if isinstance(value, str) else value
    return isinstance(option, type) and isinstance(value, option), value


def _check_limits(limits: Mapping[str, Any], value: Any, where: str) -> None:
    for one in value if isinstance(value, list | tuple) else (value,):
        if one is None:
            continue
        if "choices" in limits and one not in limits["choices"]:
            options = [str(option) for option in limits["choices"] if option is not None]
            raise ConfigError(f"{where} must be one of {', '.join(options)}, not {one!r}{nearest(str(one), options)}.")
        if not isinstance(one, int | float) or isinstance(one, bool):
            continue
        if isinstance(one, float) and not math.isfinite(one) and not one <= limits.get("most", 0.0) == math.inf:
            raise ConfigError(f"{where} must be a finite number, not {one}.")
        for name, words, fits in (("least", "at least", one >= limits.get("least", one)),
                                  ("most", "at most", one <= limits.get("most", one)),
                                  ("above", "above", "above" not in limits or one > limits["above"]),
                                  ("below", "below", "below" not in limits or one < limits["below"])):
            if not fits:
                raise ConfigError(f"{where} must be {words} {limits[name]}, not {one}.")


def _name(option: Any) -> str:
    origin = get_origin(option)
    if origin is Literal:
        return " or ".join(map(repr, get_args(option)))
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    if origin in (list, tuple, Sequence):
        inner = get_args(option)
        return "a list" if origin is not tuple or inner[-1:] == (Ellipsis,) else f"a list of {len(inner)}"
    if origin in (dict, Mapping) or option in (dict, Mapping) or dataclasses.is_dataclass(option):
        return "a mapping of keys to values"
    return plain.get(option, getattr(option, "__name__", str(option)))


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its dotted key; sources go by their names, so that one more does not move the others."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{inner.get('name', number)}")
    else:
        yield key, value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "not given"
