"""Whether a run may go on from a checkpoint, and what it does differently from the run that saved it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.settings import changed_settings

_SHOWN = 8


def settings_remark(before: Mapping[str, Any], now: Mapping[str, Any], silent: Sequence[str]) -> str:
    """One sentence without full stop on all that `changed_settings` finds ("": nothing)."""
    changes = changed_settings(before, now, silent)
    shown = changes[:_SHOWN] + ([f"{len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else [])
    return f"other settings than in the run that saved its state: {'; '.join(shown)}" if changes else ""


def refuse_other_numbers(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any], names: Mapping[str, str],
                         instead: str) -> None:
    """Refuse a checkpoint whose counts (`names`: key → noun) differ, on which the order of samples depends.

    Raises:
        CheckpointError: they differ.
    """
    for key, noun in names.items():
        if saved.get(key) != now[key]:
            raise CheckpointError(
                f"{folder}: was saved by a run with {saved.get(key)} {noun}, this one has {now[key]}, so it would not "
                f"go on with the same numbers; use {saved.get(key)} again, or take only its weights ({instead}) in a "
                "new folder.")


def refuse_other_kind(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any], names: Mapping[str, str],
                      instead: str) -> None:
    """Refuse a checkpoint of another engine, model or optimiser (`names`: key → noun).

    Raises:
        ConfigError: they differ.
    """
    for key, noun in names.items():
        if saved.get(key) != now[key]:
            raise ConfigError(f"{folder}: was saved with the {noun} {_brief(saved.get(key))}, this run has "
                              f"{_brief(now[key])}; use the same, or start from its weights in a new folder "
                              f"({instead}).")


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
