"""Samples that cannot be used: named, counted, skipped, and fatal after many in a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

BROKEN, DROPPED, TOO_LONG = "broken", "dropped", "too long"
UNUSABLE_IN_A_ROW = 1000  # limit of dropped and over-long sequences in a row, against an endless search
NAMED = 5  # records named for each reason of a skip


@dataclass(frozen=True)
class SkippedSample:
    """A record that was skipped (or, if too long, shortened).

    `kind`: BROKEN, DROPPED or TOO_LONG; `reason`: a few words, the same for many records; `where`: file and line or
    sample, for broken records the whole sentence.
    """

    source: int
    kind: str
    reason: str
    where: str


class SkipBudget:
    """How many samples in a row may be skipped: `most` broken ones."""

    def __init__(self, most: int, broken: int = 0) -> None:
        self.most, self.broken, self.unusable = most, broken, 0

    def good(self) -> None:
        """A usable sample was found."""
        self.broken = self.unusable = 0

    def spend(self, kind: str = BROKEN) -> bool:
        """Count a skipped sample; True when the limit is reached."""
        self.unusable += 1
        self.broken += kind == BROKEN
        return self.broken >= self.most or (kind != BROKEN and self.unusable >= UNUSABLE_IN_A_ROW)


class BadSamples:
    """Unreadable samples of a data set: `bad` has (key, reason) of each, once; `log` gets one line each.

    Inside data workers the copies there fill their own lists; `StepBatches` adds them to the training process's.
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
        """Use one list with `other`."""
        self.bad, self._known = other.bad, other._known

    def _add(self, key: str, reason: str) -> bool:
        new = (key, reason) not in self._known
        if new:
            self._known.add((key, reason))
            self.bad.append((key, reason))
        return new


def add_skipped(group: dict[str, Any], reason: str, count: int, places: list[str]) -> bool:
    """Count records skipped for a reason and name the first few; whether one of them is newly named."""
    entry = group.setdefault(reason, {"count": 0, "first": []})
    known = entry["first"]
    entry["count"] += count
    entry["first"] = [*dict.fromkeys([*known, *places])][:NAMED]
    return len(entry["first"]) > len(known)


def add_counts(into: dict[str, Any], counts: Mapping[str, Any]) -> None:
    """Add the counts of a source in another process or run: numbers, and records skipped by reason."""
    for key, own in into.items():
        if isinstance(own, dict):
            for reason, more in counts[key].items():
                add_skipped(own, reason, more["count"], more["first"])
        else:
            into[key] = own + counts[key]
