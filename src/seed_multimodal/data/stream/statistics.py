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
            entry = group.setdefault(sample.reason, {"count": 0, "first": []})
            entry["count"] += 1
            if sample.where not in entry["first"] and len(entry["first"]) < NAMED:
                entry["first"].append(sample.where)
                if self.log is not None:
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
                for key in ("sequences", "tokens", "further_pieces"):
                    self.sources[name][key] += counts[key]
                add_skipped(self.sources[name], counts)


def add_skipped(into: dict[str, Any], counts: Mapping[str, Any]) -> None:
    """Add the `skipped` and `too_long` of a source to those of another process or run."""
    for group in ("skipped", "too_long"):
        for reason, more in counts[group].items():
            entry = into[group].setdefault(reason, {"count": 0, "first": []})
            entry["count"] += more["count"]
            entry["first"] = [*dict.fromkeys([*entry["first"], *more["first"]])][:NAMED]
