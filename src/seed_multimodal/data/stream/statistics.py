"""Statistics of a run's data: sequences and tokens of each source, and every skipped record, counted and named."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from seed_multimodal.data.stream.data_settings import SourceSettings
from seed_multimodal.data.stream.plan import MicroBatch
from seed_multimodal.data.stream.skip_budget import TOO_LONG, SkippedSample

NAMED = 5  # records named for each reason of a skip


class DataStatistics:
    """Counts of one rank, of the batches that `at` gave (look-ahead not included)."""

    def __init__(self, names: Sequence[str], log: Callable[[str], None] | None = None) -> None:
        self.log, self._names = log, list(names)
        self.restore([])

    @property
    def fill(self) -> float:
        """Share of positions that are no padding."""
        return self.tokens / self.positions if self.positions else 1.0

    def note(self, batch: MicroBatch) -> None:
        """Count a micro-batch."""
        self.positions += batch.input_ids.size
        self.tokens += int(batch.lengths.sum())
        for source, tokens, first in batch.used:
            counts = self.sources[self._names[source]]
            counts["sequences"] += 1
            counts["tokens"] += tokens
            counts["further_pieces"] += not first
        self.note_skipped(batch.skipped)

    def note_skipped(self, samples: Sequence[SkippedSample]) -> None:
        """Count and name skipped records."""
        for sample in samples:
            name = self._names[sample.source]
            group = self.sources[name]["too_long" if sample.kind == TOO_LONG else "skipped"]
            if _add_skipped(group, sample.reason, 1, [sample.where]) and self.log is not None:
                what = f"too long, {sample.reason}" if sample.kind == TOO_LONG else f"skipped ({sample.reason})"
                self.log(f"{name}: {what}: {sample.where}")

    def report(self, sizes: Sequence[int], settings: Sequence[SourceSettings]) -> dict[str, Any]:
        """`{"fill", "positions", "tokens", "sources": {name: {...}}}` of this rank.

        Of each source: `sequences` and `tokens` in batches, `further_pieces` of split documents among the sequences,
        `draws` (skipped ones included), `share` of the tokens,
        `epochs` (this rank's draws over the source's records: add up the ranks), `records`, `cycles`, and
        `skipped` and `too_long`: reason -> {"count", "first"}, the first few named by file and line or sample.
        """
        total = max(1, self.tokens)
        sources = {}
        for (name, counts), size, one in zip(self.sources.items(), sizes, settings, strict=True):
            lost = sum(entry["count"] for entry in counts["skipped"].values())
            lost += counts["too_long"].get("skipped", {"count": 0})["count"]
            draws = counts["sequences"] - counts["further_pieces"] + lost
            sources[name] = {**counts, "draws": draws, "share": counts["tokens"] / total, "epochs": draws / size,
                             "records": size, "cycles": one.cycles}
        return {"fill": self.fill, "positions": self.positions, "tokens": self.tokens, "sources": sources}

    def state(self) -> dict[str, Any]:
        """The counts, json-able."""
        return {"positions": self.positions, "tokens": self.tokens, "sources": copy.deepcopy(self.sources)}

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Start from the sum of saved counts (one rank takes those of all, the others none)."""
        self.positions = sum(state["positions"] for state in states)
        self.tokens = sum(state["tokens"] for state in states)
        self.sources: dict[str, dict[str, Any]] = {
            name: {"sequences": 0, "tokens": 0, "further_pieces": 0, "skipped": {}, "too_long": {}}
            for name in self._names}
        for state in states:
            for name, counts in state["sources"].items():
                add_counts(self.sources[name], counts)


def add_counts(into: dict[str, Any], counts: Mapping[str, Any]) -> None:
    """Add the counts of a source in another process or run, of the keys that `into` has: numbers, and records skipped
    by reason."""
    for key, own in into.items():
        if isinstance(own, dict):
            for reason, more in counts[key].items():
                _add_skipped(own, reason, more["count"], more["first"])
        else:
            into[key] = own + counts[key]


def _add_skipped(group: dict[str, Any], reason: str, count: int, places: Sequence[str]) -> bool:
    """Count records skipped for a reason and name the first few; whether one of them is newly named."""
    entry = group.setdefault(reason, {"count": 0, "first": []})
    known = entry["first"]
    entry["count"] += count
    entry["first"] = [*dict.fromkeys([*known, *places])][:NAMED]
    return len(entry["first"]) > len(known)
