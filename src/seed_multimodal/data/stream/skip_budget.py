"""Samples that cannot be used: named, counted, skipped, and fatal after many in a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from seed_multimodal.errors import DataError

BROKEN, DROPPED, TOO_LONG = "broken", "dropped", "too long"
UNUSABLE_IN_A_ROW = 1000  # dropped and over-long sequences one after another: an endless search otherwise


class BadSamples:
    """Samples that could not be read: `bad` has (key, reason) of each, once; `log` is told the first time.

    Inside data workers the copies there fill their own lists; `data.stream.step_batches.StepBatches` brings them home.
    """

    def __init__(self, log: Callable[[str], None] | None) -> None:
        self.log = log
        self.bad: list[tuple[str, str]] = []
        self._known: set[tuple[str, str]] = set()

    def note_bad(self, key: str, reason: str) -> None:
        """Count and log a bad sample, unless it is known already."""
        if (key, reason) in self._known:
            return
        self._known.add((key, reason))
        self.bad.append((key, reason))
        if self.log is not None:
            self.log(f"skipped: {reason}")

    def state_dict(self) -> dict[str, Any]:
        """What is known so far, for JSON."""
        return {"bad": [list(pair) for pair in self.bad]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Know what an earlier run knew, too, without logging it again."""
        for key, reason in state["bad"]:
            if (key, reason) not in self._known:
                self._known.add((key, reason))
                self.bad.append((key, reason))

    def share_bad(self, other: BadSamples) -> None:
        """Keep one account with `other`."""
        self.bad, self._known = other.bad, other._known


@dataclass(frozen=True)
class SkippedSample:
    """A draw that gave no sequence (or, for over-long ones, not the whole): why, and which record."""

    source: int
    kind: str  # BROKEN, DROPPED or TOO_LONG
    reason: str  # in a few words, the same for many records
    where: str  # file and line or sample; for broken records the whole sentence


class SkipBudget:
    """Counts unusable draws one after another, and ends a search without hope."""

    def __init__(self, most_broken: int, broken: int = 0) -> None:
        self.most_broken, self.broken, self.unusable = most_broken, broken, 0

    def good(self) -> None:
        """A usable sequence was found."""
        self.broken = self.unusable = 0

    def lose(self, dropped: SkippedSample, name: str) -> None:
        """A draw gave nothing.

        Raises:
            DataError: it was one too many.
        """
        self.unusable += 1
        self.broken += dropped.kind == BROKEN
        if self.broken >= self.most_broken:
            raise DataError(f"{self.broken} records are broken without a good one between them, the last of source "
                            f"{name}: {dropped.where}")
        if self.unusable >= UNUSABLE_IN_A_ROW:
            raise DataError(f"{self.unusable} draws in a row gave no sequence, the last of source {name} "
                            f"({dropped.reason}): {dropped.where}")
