"""Typed settings: dataclasses filled from mappings (YAML, JSON), with types checked by pydantic.

@dataclass
class Example:
    steps: int = setting(minimum=1)                     # required, at least 1
    lr: float = setting(1e-4, above=0)
    precision: str = setting("bf16", choices=("bf16", "fp16", "fp32"))
    files: list[str] = setting(factory=list)

read_settings(Example, {"steps": 100, "lr": 3e-4}, "trainer")
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from seed_multimodal.errors import ConfigError, first_line

T = TypeVar("T")
SEEDS: dict[str, Any] = {
    "minimum": -(2**63),
    "maximum": 2**64 - 1,
}  # range of torch's generator seeds
_COMPARISONS = {
    "minimum": ("at least", operator.ge),
    "maximum": ("at most", operator.le),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
}


def setting(
    default: Any = dataclasses.MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """A dataclass field with limits, applied to each item of a list and not to None."""
    limits = {
        name: limit
        for name, limit in (
            ("minimum", minimum),
            ("above", above),
            ("maximum", maximum),
            ("below", below),
            ("choices", choices),
        )
        if limit is not None
    }
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=limits)
    return dataclasses.field(default=default, metadata=limits)


def read_settings(kind: type[T], values: Mapping[str, Any] | DictConfig, where: str) -> T:
    """An instance of the dataclass `kind` from a mapping; `where`: prefix of errors, such as `trainer` or a file.

    Raises ConfigError: an unknown key (with the nearest), a missing one, a value of another type or out of range.
    """
    try:
        plain: Any = (
            OmegaConf.to_container(values, resolve=True)
            if isinstance(values, DictConfig)
            else values
        )
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{where}: {first_line(error)} (key {getattr(error, 'full_key', '?')})."
        ) from error
    made: T = check_value(kind, plain, where)
    check_settings(made, where)
    return made


def check_settings(settings: Any, where: str) -> None:
    """Check the limits of a dataclass's fields. Raises ConfigError."""
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if dataclasses.is_dataclass(value):
            check_settings(value, f"{where}: {entry.name}")
        else:
            _check_limits(entry.metadata, value, f"{where}: {entry.name}")


def check_value(hint: Any, value: Any, where: str, **limits: Any) -> Any:
    """A value converted to the type `hint`, within limits as in `setting`. Raises ConfigError."""
    from pydantic import ValidationError

    try:
        made = _adapter(hint).validate_python(value)
    except ValidationError as error:
        raise ConfigError(_sentence(hint, error.errors()[0], where)) from None
    for name, given in value.items() if isinstance(value, Mapping) else ():
        if isinstance(given, bool) and type(getattr(made, name, given)) in (int, float):
            raise ConfigError(f"{where}: {name} must be a number, not {given!r}.")
    _check_limits(limits, made, where)
    return made


@functools.cache
def _adapter(hint: Any) -> Any:
    """pydantic's adapter of a type; dataclasses in it forbid unknown keys."""
    from pydantic import ConfigDict, TypeAdapter

    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    if dataclasses.is_dataclass(hint):
        hint.__pydantic_config__ = config  # type: ignore[union-attr]
        return TypeAdapter(hint)
    return TypeAdapter(hint, config=config)


def _sentence(kind: Any, error: Mapping[str, Any], where: str) -> str:
    """Message of a validation error."""
    *path, last = error["loc"] or ("",)
    if error["type"] == "unexpected_keyword_argument":
        return f"{': '.join([where, *map(str, path)])}: unknown key {last!r}{nearest(str(last), sorted(_names(kind)))}."
    where = ": ".join([where, *map(str, error["loc"])])
    if error["type"] in ("missing", "missing_argument"):
        return f"{where} is required."
    return f"{where}: {error['msg'][:1].lower()}{error['msg'][1:]}, not {error['input']!r}."


def _names(hint: Any) -> set[str]:
    """Names of the fields of all dataclasses in a type, at any depth."""
    if not dataclasses.is_dataclass(hint):
        return {name for inner in get_args(hint) for name in _names(inner)}
    hints = get_type_hints(hint)
    fields = [entry.name for entry in dataclasses.fields(hint) if entry.init]
    return {*fields, *(name for field in fields for name in _names(hints[field]))}


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ConfigError for the first key of `given` that is not in `known`, with the nearest known key."""
    options = list(known)
    for key in given:
        if key not in options:
            raise ConfigError(
                f"{where}: unknown key {key!r}{nearest(key, options)}; "
                f"known keys are {', '.join(sorted(options)) or 'none'}."
            )


def nearest(key: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest known key, or an empty string."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def describe_settings(kind: Any, key: str) -> list[str]:
    """For `--help`: `key.name=default` of each field of a dataclass (`???`: required), and its choices or type."""
    lines, hints = [], get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        hint, name = hints[entry.name], f"{key}.{entry.name}"
        if dataclasses.is_dataclass(hint):
            lines += describe_settings(hint, name)
            continue
        inner = next((one for one in get_args(hint) if dataclasses.is_dataclass(one)), None)
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        shown = (
            "???"
            if default is dataclasses.MISSING
            else json.dumps(default, default=str).replace('"', "")
        )
        choices = ", ".join(map(str, entry.metadata.get("choices", ())))
        type_name = hint.__name__ if type(hint) is type else re.sub(r"\w+\.", "", str(hint))
        lines.append(f"{name}={shown}  ({choices or type_name})")
        lines += (
            describe_settings(inner, f"{name}[]")
            if inner is not None and str(hint).startswith("list")
            else []
        )
    return lines


def changed_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], silent: Sequence[str] = ()
) -> list[str]:
    """`key: before -> now` for each differing setting, except dotted keys below `silent`."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return [
        f"{key}: {old.get(key, 'not given')} -> {new.get(key, 'not given')}"
        for key in sorted(old.keys() | new)
        if old.get(key) != new.get(key)
        and not any(key == one or key.startswith(f"{one}.") for one in silent)
    ]


def _check_limits(limits: Mapping[str, Any], value: Any, where: str) -> None:
    for one in value if isinstance(value, list | tuple) else (value,):
        if one is not None and one not in limits.get("choices", (one,)):
            options = [str(option) for option in limits["choices"] if option is not None]
            raise ConfigError(
                f"{where} must be one of {', '.join(options)}, not {one!r}{nearest(str(one), options)}."
            )
        for name, (words, fits) in _COMPARISONS.items() if isinstance(one, int | float) else ():
            if name in limits and not fits(one, limits[name]):
                raise ConfigError(f"{where} must be {words} {limits[name]}, not {one}.")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its dotted key; list items with a name are keyed by it, not by position."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{inner.get('name', number)}")
    else:
        yield key, value
