"""Which settings differ between the run that saved a state and the one that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seed_multimodal.settings import changed_settings

_SHOWN = 8


def settings_remark(before: Mapping[str, Any], now: Mapping[str, Any], silent: Sequence[str]) -> str:
    """One sentence without full stop on all that `changed_settings` finds ("": nothing)."""
    changes = changed_settings(before, now, silent)
    shown = changes[:_SHOWN] + ([f"{len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else [])
    return f"other settings than in the run that saved its state: {'; '.join(shown)}" if changes else ""
