"""Samples that cannot be used: named, counted, skipped, and fatal after many in a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

BROKEN, DROPPED, TOO_LONG = "broken", "dropped", "too long"
UNUSABLE_IN_A_ROW = 1000  # limit of dropped and over-long sequences in a row, against an endless search


@dataclass(frozen=True)
class SkippedSample:
    """A draw whose sequence was skipped (or, if over-long, shortened): why, and which record."""

    source: int
    kind: str  # BROKEN, DROPPED or TOO_LONG
    reason: str  # in a few words, the same for many records
    where: str  # file and line or sample; for broken records the whole sentence


class SkipBudget:
    """How many samples in a row may be skipped.

    Args:
        most: the run ends at this many broken samples in a row.
        broken: how many there are already.
    """

    def __init__(self, most: int, broken: int = 0) -> None:
        self.most, self.broken, self.unusable = most, broken, 0

    def good(self) -> None:
        """A usable sample was found."""
        self.broken = self.unusable = 0

    def spend(self, kind: str = BROKEN) -> bool:
        """Count a skipped sample; True when the limit is reached (dropped and over-long ones have a limit of their
        own)."""
        self.unusable += 1
        self.broken += kind == BROKEN
        return self.broken >= self.most or (kind != BROKEN and self.unusable >= UNUSABLE_IN_A_ROW)


class BadSamples:
    """The account of a data set's unreadable samples: `bad` has (key, reason) of each, once; `log` gets one line each.

    Inside data workers the copies there fill their own lists; `step_batches.StepBatches` adds them to the account of
    the process that trains.
    """

    def __init__(self, log: Callable[[str], None] | None) -> None:
        self.log = log
        self.bad: list[tuple[str, str]] = []
        self._known: set[tuple[str, str]] = set()

    def note_bad(self, key: str, reason: str) -> None:
        """Count and log a bad sample, unless already counted."""
        if self._add(key, reason) and self.log is not None:
            self.log(f"skipped: {reason}")

    def state_dict(self) -> dict[str, Any]:
        """The bad samples so far, JSON-able."""
        return {"bad": [list(pair) for pair in self.bad]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Add the bad samples of an earlier run, without logging them again."""
        for key, reason in state["bad"]:
            self._add(key, reason)

    def share_bad(self, other: BadSamples) -> None:
        """Keep one account with `other`."""
        self.bad, self._known = other.bad, other._known

    def _add(self, key: str, reason: str) -> bool:
        new = (key, reason) not in self._known
        if new:
            self._known.add((key, reason))
            self.bad.append((key, reason))
        return new
