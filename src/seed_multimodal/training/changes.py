"""Which settings differ between the run that saved a state and the one that goes on from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SHOWN = 8


def settings_remark(before: Mapping[str, Any], now: Mapping[str, Any], silent: Sequence[str]) -> str:
    """One sentence without full stop on all that `changed_settings` finds ("": nothing)."""
    changes = changed_settings(before, now, silent)
    shown = changes[:_SHOWN] + ([f"{len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else [])
    return f"other settings than in the run that saved its state: {'; '.join(shown)}" if changes else ""


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], silent: Sequence[str] = ()) -> list[str]:
    """`key: before -> now` for each setting in which two resolved configurations differ, in alphabetical order.

    Args:
        silent: dotted keys of what changes no number of a training; all below such a key is silent, too.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    return [f"{key}: {_word(old, key)} -> {_word(new, key)}" for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not any(key == one or key.startswith(f"{one}.") for one in silent)]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its dotted key; sources go by their names, so that one more does not move the others."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{inner.get('name', number)}")
    else:
        yield key, value


def _word(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "not given"
