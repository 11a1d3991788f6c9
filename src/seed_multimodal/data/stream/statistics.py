"""What a run's data was: sequences and tokens of each source, and every record passed over, counted and named."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from seed_multimodal.data.stream.packing import MicroBatch
from seed_multimodal.data.stream.skip_budget import TOO_LONG, SkippedSample
from seed_multimodal.data.stream.data_settings import SourceSettings

NAMED = 5  # of the records passed over for one reason, so many are named


class DataStatistics:
    """Counts of one rank, of the batches handed out (look-ahead not included)."""

    def __init__(self, names: Sequence[str], log: Callable[[str], None] | None = None) -> None:
        self.log = log
        self.positions = self.tokens = 0
        self.sources: dict[str, dict[str, Any]] = {
            name: {"sequences": 0, "tokens": 0, "further_pieces": 0, "skipped": {}, "too_long": {}} for name in names}
        self._names = list(names)

    @property
    def fill(self) -> float:
        """Share of positions that are no padding."""
        return self.tokens / self.positions if self.positions else 1.0

    def note(self, loaded: MicroBatch) -> None:
        """Count a micro-batch."""
        self.positions += loaded.input_ids.size
        self.tokens += int(loaded.lengths.sum())
        for source, tokens, first in loaded.used:
            counts = self.sources[self._names[source]]
            counts["sequences"] += 1
            counts["tokens"] += tokens
            counts["further_pieces"] += not first
        self.pass_over(loaded.dropped)

    def pass_over(self, dropped: Sequence[SkippedSample]) -> None:
        """Count and name what was left out."""
        for one in dropped:
            self._pass_over(one)

    def _pass_over(self, dropped: SkippedSample) -> None:
        name = self._names[dropped.source]
        group = self.sources[name]["too_long" if dropped.kind == TOO_LONG else "skipped"]
        entry = group.setdefault(dropped.reason, {"count": 0, "first": []})
        entry["count"] += 1
        if dropped.where not in entry["first"] and len(entry["first"]) < NAMED:
            entry["first"].append(dropped.where)
            if self.log is not None:
                what = f"too long, {dropped.reason}" if dropped.kind == TOO_LONG else f"skipped ({dropped.reason})"
                self.log(f"{name}: {what}: {dropped.where}")

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
            lost += sum(entry["count"] for reason, entry in counts["too_long"].items() if reason == "skipped")
            draws = counts["sequences"] - counts["further_pieces"] + lost
            sources[name] = {**counts, "draws": draws, "share": counts["tokens"] / total, "epochs": draws / size,
                             "records": size, "cycles": one.cycles}
        return {"fill": self.fill, "positions": self.positions, "tokens": self.tokens, "sources": sources}

    def state(self) -> dict[str, Any]:
        """The counts, json-able."""
        return {"positions": self.positions, "tokens": self.tokens, "sources": copy.deepcopy(self.sources)}

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take over the sum of saved counts (one rank takes those of all, the others none)."""
        fresh = DataStatistics(self._names)
        self.positions = sum(state["positions"] for state in states)
        self.tokens = sum(state["tokens"] for state in states)
        for state in states:
            for name, counts in state["sources"].items():
                own = fresh.sources[name]
                own["sequences"] += counts["sequences"]
                own["tokens"] += counts["tokens"]
                own["further_pieces"] += counts.get("further_pieces", 0)  # not in older states
                for group in ("skipped", "too_long"):
                    for reason, entry in counts[group].items():
                        sum_ = own[group].setdefault(reason, {"count": 0, "first": []})
                        sum_["count"] += entry["count"]
                        sum_["first"] = [*dict.fromkeys([*sum_["first"], *entry["first"]])][:NAMED]
        self.sources = fresh.sources
