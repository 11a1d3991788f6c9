"""One process's share of a run: unit after unit, decode → encode → write, restartable at each unit.

Codes of a batch are fetched while the next one is computed. Batches are made inside a unit, in the order of its
samples, so that they depend on the unit and the batch size only, not on how many processes or workers there are.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from seed_multimodal.data.pretokenize.decode import DecodedSample, DecodedTask, TaskDecoder, decoding, iterate
from seed_multimodal.data.pretokenize.encode import Codes, Encoder
from seed_multimodal.data.pretokenize.output import PartWriter
from seed_multimodal.data.pretokenize.slots import filled
from seed_multimodal.data.pretokenize.units import Unit
from seed_multimodal.data.stream.skip_budget import SkipBudget
from seed_multimodal.errors import DataError, counted
from seed_multimodal.progress import Progress

NAMED = 100  # broken samples and pictures that a part's manifest names


@dataclass
class _Part:
    """An unfinished unit: `rows` [3, S, S] to be encoded, each with its place in `codes`, batches being encoded, and
    samples waiting for codes. `places`: of the rows by name. The other fields go into the part's manifest."""

    writer: PartWriter
    codes: list[list[int] | None] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    rows: deque[tuple[Tensor, int]] = field(default_factory=deque)
    batches: deque[tuple[Codes, list[int]]] = field(default_factory=deque)
    waiting: deque[DecodedSample] = field(default_factory=deque)
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)


class Extractor:
    """Encodes units in order into `save_dir`.

    Args:
        workers: decode processes.
        limit: records per tar.
        max_bad: so many broken samples in a row, across units, end the run.
        made: recorded in each part: device, precision, versions.
        progress: in weights of units; also takes a line for each broken sample.
    """

    def __init__(self, encoder: Encoder, decoder: TaskDecoder, units: Sequence[Unit], save_dir: Path, *,
                 batch_size: int, workers: int, limit: int, max_bad: int, made: dict[str, Any],
                 progress: Progress) -> None:
        self.encoder, self.decoder, self.units, self.save_dir = encoder, decoder, units, save_dir
        self.batch_size, self.limit, self.made, self.progress = batch_size, limit, made, progress
        self.pictures = self.units_done = 0
        self._loader = decoding(units, decoder, workers)
        self._skip_budget = SkipBudget(max_bad)

    def run(self) -> None:
        """Encode all units.

        Raises:
            DataError: too many broken samples in a row, an input that cannot be opened, a full disk.
        """
        results = iterate(self._loader)
        try:
            for unit in self.units:
                with PartWriter(self.save_dir, unit, self.limit) as writer:
                    self._make(_Part(writer), results)
                self.units_done += 1
        finally:
            self._loader.close()

    def summary(self) -> str:
        """Counts, speed, and the time spent waiting for decode workers."""
        seconds = max(self.progress.seconds, 1e-9)
        return (f"{counted(self.units_done, 'unit')}, {counted(self.pictures, 'picture')} in {seconds:.1f} s "
                f"({self.pictures / seconds:,.0f}/s, waited for data {self._wait()} of the time).")

    def _wait(self) -> str:
        return f"{100 * self._loader.wait_seconds / max(self.progress.seconds, 1e-9):.0f} %"

    def _make(self, part: _Part, results: Iterator[DecodedTask]) -> None:
        """One part, of the next results up to the last one of its unit."""
        for result in results:
            self._take(part, result)
            self._encode(part)
            self._write(part)
            seconds = max(self.progress.seconds, 1e-9)
            self.progress.update(result.task.weight, units=f"{self.units_done}/{len(self.units)}",
                                 pictures=f"{self.pictures:,} ({self.pictures / seconds:,.0f}/s)", wait=self._wait())
            if result.task.last:
                break
        self._encode(part, flush=True)
        self._write(part)
        if result.task.damage:
            self._note_bad(part, result.task.damage)
        count = part.counts
        part.writer.finish({
            "read": count["read"], "samples": count["samples"], "pictures": sum(row is not None for row in part.codes),
            "bad": count["bad"], "lost_pictures": count["lost"], "bad_named": part.named,
            "dropped": dict(sorted(part.dropped.items())), "made": self.made})

    def _take(self, part: _Part, result: DecodedTask) -> None:
        """Add a task's rows that are new, and its samples."""
        places = []
        for pixels, name in zip(result.pixels, result.names, strict=True):
            place = part.places.get(name) if name else None
            if place is None:
                place = len(part.codes)
                part.codes.append(None)
                part.rows.append((pixels, place))
                if name:
                    part.places[name] = place
            places.append(place)
        for sample in result.samples:
            part.counts["read"] += 1
            if sample.bad:
                self._note_bad(part, sample.bad)
                continue
            self._skip_budget.good()
            for sentence in sample.lost:
                part.counts["lost"] += 1
                self._name(part, sentence, "left out of its document")
            if sample.dropped:
                part.dropped[sample.dropped] += 1
                continue
            sample.rows = [None if views is None else [places[row] for row in views] for views in sample.rows]
            part.waiting.append(sample)

    def _note_bad(self, part: _Part, sentence: str) -> None:
        part.counts["bad"] += 1
        self._name(part, sentence, "skipped")
        if self._skip_budget.spend():
            count = self._skip_budget.broken
            raise DataError(sentence if count == 1 else f"{sentence} ({count} broken samples in a row)")

    def _name(self, part: _Part, sentence: str, what: str) -> None:
        if len(part.named) < NAMED:
            part.named.append(sentence)
        self.progress.say(f"{what}: {sentence}")

    def _encode(self, part: _Part, flush: bool = False) -> None:
        """Start whole batches (with `flush` the rest too); leave one running, fetch the codes of the earlier ones."""
        while len(part.rows) >= (1 if flush else self.batch_size):
            batch = [part.rows.popleft() for _ in range(min(self.batch_size, len(part.rows)))]
            codes = self.encoder.start([pixels for pixels, _ in batch])
            part.batches.append((codes, [place for _, place in batch]))
            if len(part.batches) > 1:
                self._fetch(part)
        while flush and part.batches:
            self._fetch(part)

    def _fetch(self, part: _Part) -> None:
        codes, places = part.batches.popleft()
        for place, row in zip(places, codes.result().tolist(), strict=True):
            part.codes[place] = [code for code in row if code >= 0]  # LaVIT's pictures have fewer
        self.pictures += len(places)

    def _write(self, part: _Part) -> None:
        """Write the samples, in order, whose codes are there."""
        while part.waiting:
            sample = part.waiting[0]
            codes = [None if views is None else [part.codes[place] for place in views] for views in sample.rows]
            if any(row is None for views in codes for row in views or ()):
                return
            part.waiting.popleft()
            record = filled(sample.record, codes, self.encoder.vocabulary)  # type: ignore[arg-type]
            part.writer.add(sample.number, record)
            part.counts["samples"] += 1
