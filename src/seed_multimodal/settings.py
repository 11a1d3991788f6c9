"""Typed settings: dataclasses filled from mappings (YAML, JSON), with types checked by pydantic,
numbers finite and in range.

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
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Protocol,
    TypedDict,
    TypeVar,
    Unpack,
    get_args,
    get_type_hints,
)

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from seed_multimodal.disk import JsonObject, folder_lock, read_json_object, replace_text, writing
from seed_multimodal.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails


class DataclassInstance(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Dataclass = DataclassInstance | type[DataclassInstance]  # what `is_dataclass` accepts
T = TypeVar("T", bound=DataclassInstance)
IDENTITY = "settings.json"  # of a folder: what determines its content, see `check_identity`
Entry = TypeVar("Entry")  # of a table
TypeHint = Any  # what an annotation may hold, such as `list[Path]` or a Literal


class Limits(TypedDict, total=False):
    """Keywords of `setting` and `check_value`: the allowed values, or a range of numbers."""

    choices: Sequence[object]
    minimum: float
    maximum: float
    above: float
    below: float


class SettingOptions(Limits, total=False):
    """Keywords of `setting`: limits, and how the flag of a command reads (`cli.common`).

    may_change: when a run of `seed eval` resumes.
    help: a setting with a help text is a flag. flag: its names, instead of the setting's. const:
    the value of a flag that is followed by none.
    """

    may_change: bool
    help: str
    metavar: str
    flag: str
    const: object


NO_LIMITS: Limits = {}
# Range of the seeds of torch's generators.
SEEDS: Limits = {"minimum": -(2**63), "maximum": 2**64 - 1}
_UNKNOWN_KEY = "unexpected_keyword_argument"  # type of pydantic's error
# Name of a limit -> its words in messages, and the comparison that a value must pass.
_COMPARISONS = {
    "minimum": ("at least", operator.ge),
    "maximum": ("at most", operator.le),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
}


# ---- declaring


def setting(
    default: object = dataclasses.MISSING,
    *,
    factory: Callable[[], object] | None = None,
    **options: Unpack[SettingOptions],
) -> Any:
    """A dataclass field with limits, applied to each item of a list or mapping and not to None."""
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=options)
    return dataclasses.field(default=default, metadata=options)


def positive(default: object = dataclasses.MISSING, **options: Any) -> Any:
    """A `setting` that is a number from 1 on."""
    return setting(default, minimum=1, **options)


def non_negative(default: object = dataclasses.MISSING, **options: Any) -> Any:
    """A `setting` that is a number from 0 on."""
    return setting(default, minimum=0, **options)


def fraction(default: float | None, **options: Any) -> Any:
    """A `setting` from 0 to 1."""
    return setting(default, minimum=0, maximum=1, **options)


# ---- reading


def read_settings(kind: type[T], values: Mapping[str, object] | DictConfig, label: str) -> T:
    """An instance of the dataclass `kind` from a mapping.

    label: prefix of error messages, such as `trainer` or a file.

    Raises ConfigError: an unknown key (with the nearest), a missing one, a value of another type
    or out of range.
    """
    # 1. Plain values; interpolations of YAML files are resolved.
    plain: object = values
    if isinstance(values, DictConfig):
        try:
            plain = OmegaConf.to_container(values, resolve=True)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", "?")
            raise ConfigError(f"{label}: {first_line(error)} (key {key}).") from error

    # 2. Their types and limits.
    return check_value(kind, plain, label)


def check_value(hint: TypeHint, value: object, label: str, **limits: Unpack[Limits]) -> Any:
    """A value converted to the type `hint`, within limits as in `setting`. Raises ConfigError."""
    from pydantic import ValidationError

    if hint in (int, float) and isinstance(value, bool | str):
        raise ConfigError(f"{label} must be a number, not {value!r}.")
    try:
        converted = adapter(hint).validate_python(value)
    except ValidationError as error:
        # A key that is unknown before one that is missing, which often is the same, misspelled.
        errors = sorted(error.errors(), key=lambda item: item["type"] != _UNKNOWN_KEY)
        raise ConfigError(_error_sentence(hint, errors[0], label)) from None
    check_settings(converted, label, limits, value)
    return converted


@functools.cache
def adapter(hint: TypeHint) -> TypeAdapter[object]:
    """pydantic's adapter of a type; dataclasses in it forbid unknown keys."""
    from pydantic import ConfigDict, TypeAdapter

    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    if dataclasses.is_dataclass(hint):
        # The adapter of a dataclass takes its configuration from the class only.
        hint.__pydantic_config__ = config  # type: ignore[union-attr]
        return TypeAdapter(hint)
    return TypeAdapter(hint, config=config)


def _error_sentence(hint: TypeHint, error: ErrorDetails, label: str) -> str:
    """The message of one of pydantic's validation errors."""
    *path, last = error["loc"] or ("",)  # keys from the outermost mapping to the value
    if error["type"] == _UNKNOWN_KEY:
        parent = ": ".join([label, *map(str, path)])
        for name, inner in _inner_types(hint):
            if last == name or last in _field_names(inner):
                owner = label if last == name else name
                return f"{parent}: {last!r} is no key here, but one of {owner}."
        near = nearest(str(last), sorted(_field_names(hint)))
        return f"{parent}: unknown key {last!r}{near}."
    full_label = ": ".join([label, *map(str, error["loc"])])
    if error["type"] in ("missing", "missing_argument"):
        return f"{full_label} is required."
    reason = error["msg"]
    return f"{full_label}: {reason[:1].lower()}{reason[1:]}, not {error['input']!r}."


def _inner_types(hint: TypeHint) -> list[tuple[str, TypeHint]]:
    """The fields of a dataclass, or of those in a type: the items of a list, the members of a
    union."""
    if not dataclasses.is_dataclass(hint):
        return [field for inner in get_args(hint) for field in _inner_types(inner)]
    hints = get_type_hints(hint)
    return [(field.name, hints[field.name]) for field in dataclasses.fields(hint) if field.init]


def _field_names(hint: TypeHint) -> set[str]:
    """Names of the fields of all dataclasses in a type, at any depth."""
    names: set[str] = set()
    for name, inner in _inner_types(hint):
        names |= {name, *_field_names(inner)}
    return names


def check_keys(keys: Iterable[str], allowed: Iterable[str], label: str) -> None:
    """Raise ConfigError for the first key that is not allowed, with the nearest allowed one."""
    options = list(allowed)
    for key in keys:
        if key not in options:
            raise ConfigError(
                f"{label}: unknown key {key!r}{nearest(key, options)}; "
                f"known keys are {', '.join(sorted(options)) or 'none'}."
            )


def find_entry(table: Mapping[str, Entry], name: str, kind: str) -> Entry:
    """An entry of a table. Raises ConfigError: none of this name (with the nearest)."""
    if name not in table:
        raise ConfigError(
            f"{name!r} is no {kind}{nearest(name, table)}; there are {', '.join(table)}."
        )
    return table[name]


def nearest(key: str, options: Iterable[str], similarity: float = 0.5) -> str:
    """` (did you mean 'x'?)` for the closest option, or an empty string."""
    close = difflib.get_close_matches(key, list(options), n=1, cutoff=similarity)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_settings(
    value: object, label: str, limits: Mapping[str, Any] = NO_LIMITS, given: object = None
) -> None:
    """Raise ConfigError for a value that is not a choice, not finite or out of range, at any depth
    of lists, mappings and dataclasses.

    given: the value before its conversion, which makes numbers of true and false.
    """
    # 1. What holds values; fields of a dataclass have limits of their own.
    inner = given if isinstance(given, Mapping) else {}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            check_settings(item, f"{label}: {field.name}", field.metadata, inner.get(field.name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_settings(item, f"{label}: {key}", limits, inner.get(key))
    elif isinstance(value, list | tuple):
        items = given if isinstance(given, list | tuple) else [None] * len(value)
        for item, given_item in zip(value, items, strict=False):
            check_settings(item, label, limits, given_item)

    # 2. One of some choices; None is always allowed.
    elif "choices" in limits and value not in (None, *limits["choices"]):
        options = [str(option) for option in limits["choices"] if option is not None]
        raise ConfigError(
            f"{label} must be one of {', '.join(options)}, not {value!r}"
            f"{nearest(str(value), options)}."
        )

    # 3. A number in a range.
    elif isinstance(value, int | float):
        if isinstance(given, bool) and not isinstance(value, bool):
            raise ConfigError(f"{label} must be a number, not {given!r}.")
        if not abs(value) <= sys.float_info.max:  # also of NaN, and of integers of any length
            raise ConfigError(f"{label} must be a finite number, not {value}.")
        for name, (phrase, is_within) in _COMPARISONS.items():
            if name in limits and not is_within(value, limits[name]):
                raise ConfigError(f"{label} must be {phrase} {limits[name]}, not {value}.")


# ---- describing and comparing


def describe_settings(kind: Dataclass, key: str) -> list[str]:
    """For `--help`: `key.name=default` of each field of a dataclass (`???`: required), and its
    choices or type."""
    lines: list[str] = []
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        full_key = f"{key}.{field.name}"
        if dataclasses.is_dataclass(hint):
            lines += describe_settings(hint, full_key)
            continue
        choices = ", ".join(map(str, field.metadata.get("choices", ())))
        # Without the modules of its names: `list[Path]`.
        type_name = hint.__name__ if type(hint) is type else re.sub(r"\w+\.", "", str(hint))
        lines.append(f"{full_key}={_default_text(field)}  ({choices or type_name})")
        # The fields of a list's items, such as those of `data.sources[]`.
        for inner in get_args(hint):
            if dataclasses.is_dataclass(inner) and str(hint).startswith("list"):
                lines += describe_settings(inner, f"{full_key}[]")
    return lines


def _default_text(field: dataclasses.Field[object]) -> str:
    default = field.default
    if callable(field.default_factory):
        default = field.default_factory()
    if default is dataclasses.MISSING:
        return "???"
    return json.dumps(default, default=str).replace('"', "")


def changed_settings(
    before: Mapping[str, object], now: Mapping[str, object], silent: Sequence[str] = ()
) -> list[str]:
    """`key: before -> now` for each differing setting, except dotted keys below `silent`."""
    old = dict(leaves(before))
    new = dict(leaves(now))
    changes = []
    for key in sorted(old.keys() | new):
        # `a` silences `a` and `a.b`, not `ab`.
        is_silent = any(key == prefix or key.startswith(f"{prefix}.") for prefix in silent)
        if old.get(key) != new.get(key) and not is_silent:
            changes.append(f"{key}: {old.get(key, 'not given')} -> {new.get(key, 'not given')}")
    return changes


def check_identity(
    folder: Path, identity: JsonObject, flag: str, begin: bool = True, label: str = ""
) -> None:
    """Write what determines a folder's content as its `IDENTITY`, or compare it with that.

    begin: False: a folder without the file stays so.
    label: the folder in messages, such as the URL that it is a copy of.

    The first of several processes writes, all compare. Raises DataError: it changed.
    """
    file = folder / IDENTITY
    if not begin and not file.exists():
        return
    text = json.dumps(identity, indent=1, ensure_ascii=False, default=str)
    with folder_lock(folder, DataError, timeout=-1), writing(file, DataError):
        if not file.exists():
            replace_text(file, text)
    changes = changed_settings(read_json_object(file, DataError), json.loads(text))
    if changes:
        raise DataError(
            f"{label or folder}: was started with other settings ({'; '.join(changes)}); use "
            f"another {flag} or the same settings."
        )


def leaves(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf with its dotted key; list items with a name are keyed by it, not by position."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}" if key else str(name))
    # A list of mappings, such as the data sources.
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{key}.{inner.get('name', index)}")
    else:
        yield key, value
