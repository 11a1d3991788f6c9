"""One process's share of a run: unit after unit, decode → encode → write, restartable at each unit.

Codes of a batch are fetched while the next one is computed. Batches are made inside a unit, in the order of its
samples, so that they depend on the unit and the batch size only, not on how many processes or workers there are.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.data.pretokenize.decode import TaskDecoder, DecodedTask, DecodedSample, decoded, tasks_of
from seed_multimodal.data.pretokenize.encode import Codes, Encoder
from seed_multimodal.data.pretokenize.progress import Progress
from seed_multimodal.data.pretokenize.units import Unit, locate
from seed_multimodal.data.pretokenize.shards import PartWriter
from seed_multimodal.errors import DataError, first_line

TASK = 32  # samples a worker decodes at a time
NAMED = 100  # broken samples and pictures that a part's manifest names


@dataclass
class SkipBudget:
    """Counts broken samples one after the other, across units."""

    limit: int
    count: int = 0

    def good(self) -> None:
        """A sample that could be read."""
        self.count = 0

    def bad(self, sentence: str) -> None:
        """Raises DataError when it is the `limit`-th in a row."""
        self.count += 1
        if self.count >= self.limit:
            raise DataError(sentence if self.count == 1 else f"{sentence} ({self.count} broken samples in a row)")


@dataclass
class _Unit:
    """A unit under way: `codes` of its rows so far, where rows of a name are, entries that wait for their rows."""

    writer: PartWriter
    codes: list[list[int] | None] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    waiting: deque[DecodedSample] = field(default_factory=deque)
    buffer: list[tuple[Tensor, list[int]]] = field(default_factory=list)
    flying: deque[tuple[Codes, list[int]]] = field(default_factory=deque)
    read: int = 0
    samples: int = 0
    bad: list[str] = field(default_factory=list)
    bad_count: int = 0
    lost: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class Worker:
    """Encodes units into `save_dir`.

    Args:
        made: noted in each part: device, precision, versions.
        limit: records per tar.
        log: gets one sentence per broken sample.
    """

    def __init__(self, encoder: Encoder, decode: TaskDecoder, save_dir: Path, *, batch_size: int, workers: int, limit: int,
                 max_bad: int, made: dict[str, Any], progress: Progress, log: Callable[[str], None]) -> None:
        self.encoder, self.decode, self.save_dir = encoder, decode, save_dir
        self.batch_size, self.workers, self.limit = batch_size, workers, limit
        self.made, self.progress, self.log = made, progress, log
        self._in_a_row = SkipBudget(max_bad)

    def run(self, units: Sequence[Unit]) -> None:
        """Encode the units in their order.

        Raises:
            DataError: too many broken samples in a row, an input that cannot be opened, a full disk.
        """
        by_number = {unit.number: unit for unit in units}
        tasks = tasks_of(units, lambda unit: locate(unit, self.decode.settings), TASK)
        parts = self._timed(decoded(tasks, self.decode, workers=self.workers,
                                    pin=self.encoder.device.type == "cuda"))
        for first in parts:
            unit = by_number[first.task.unit]
            with PartWriter(self.save_dir, unit, self.limit) as writer:
                self._unit(_Unit(writer), first, parts)
            self.progress.unit_done(unit.weight)

    def _timed(self, parts: Iterator[DecodedTask]) -> Iterator[DecodedTask]:
        """The same, with the time that is spent waiting for the decode workers."""
        while True:
            start = time.perf_counter()
            try:
                part = next(parts, None)
            except RuntimeError as error:
                if "DataLoader worker" in str(error) and "killed" in str(error):
                    raise DataError(f"A decode worker was killed ({first_line(error)}); with fewer "
                                    "--num_workers less memory is needed.") from None
                raise
            self.progress.waited(time.perf_counter() - start)
            if part is None:
                return
            yield part

    def _unit(self, state: _Unit, part: DecodedTask, parts: Iterator[DecodedTask]) -> None:
        while True:
            self._take(state, part)
            if part.task.last:
                break
            part = next(parts)
        self._encode(state, flush=True)
        self._write(state)
        pictures = sum(codes is not None for codes in state.codes)
        if part.task.damage:
            self._bad(state, part.task.damage)
        state.writer.finish({
            "read": state.read, "samples": state.samples, "pictures": pictures, "bad": state.bad_count,
            "lost_pictures": state.lost, "bad_named": state.bad, "dropped": dict(sorted(state.dropped.items())),
            "made": self.made})

    def _take(self, state: _Unit, part: DecodedTask) -> None:
        """Add a task's rows that are new, and its entries."""
        rows, new = [], []
        for row, name in enumerate(part.names):
            place = state.places.get(name, -1) if name else -1
            if place < 0:
                place = len(state.codes)
                state.codes.append(None)
                new.append(row)
                if name:
                    state.places[name] = place
            rows.append(place)
        for entry in part.entries:
            state.read += 1
            if entry.bad:
                self._bad(state, entry.bad)
                continue
            self._in_a_row.good()
            for sentence in entry.lost:
                state.lost += 1
                self._name(state, sentence, "left out of its document")
            if entry.dropped:
                state.dropped[entry.dropped] += 1
                continue
            entry.rows = [None if views is None else [rows[row] for row in views] for views in entry.rows]
            state.waiting.append(entry)
        if new:
            state.buffer.append((part.pixels if len(new) == len(part.names) else part.pixels[new],
                                 [rows[row] for row in new]))
        self._encode(state)
        self._write(state)

    def _bad(self, state: _Unit, sentence: str) -> None:
        state.bad_count += 1
        self._name(state, sentence, "skipped")
        self._in_a_row.bad(sentence)

    def _name(self, state: _Unit, sentence: str, what: str) -> None:
        if len(state.bad) < NAMED:
            state.bad.append(sentence)
        self.log(f"{what}: {sentence}")

    def _encode(self, state: _Unit, flush: bool = False) -> None:
        """Start whole batches (with `flush` the rest too); keep one on its way, fetch the codes of those before."""
        while state.buffer and (flush or sum(len(places) for _, places in state.buffer) >= self.batch_size):
            pixels, places = _first_rows(state.buffer, self.batch_size)
            state.flying.append((self.encoder.start(pixels), places))
            if len(state.flying) > 1:
                self._fetch(state)
        while flush and state.flying:
            self._fetch(state)

    def _fetch(self, state: _Unit) -> None:
        codes, places = state.flying.popleft()
        for place, row in zip(places, codes.result().tolist(), strict=True):
            state.codes[place] = row
        self.progress.encoded(len(places), state.writer.unit, state.read)

    def _write(self, state: _Unit) -> None:
        """Write the entries, in order, whose codes are there."""
        while state.waiting:
            entry = state.waiting[0]
            codes = [None if views is None else [state.codes[place] for place in views] for views in entry.rows]
            if any(row is None for views in codes for row in views or ()):
                return
            state.waiting.popleft()
            record = self.decode.kind.record(entry.parsed, codes, self.encoder.vocabulary)  # type: ignore[arg-type]
            state.writer.add(entry.number, record)
            state.samples += 1


def _first_rows(buffer: list[tuple[Tensor, list[int]]], count: int) -> tuple[Tensor, list[int]]:
    """Take at most `count` rows from the front of the buffer."""
    pixels: list[Tensor] = []
    places: list[int] = []
    while buffer and len(places) < count:
        block, its = buffer.pop(0)
        room = count - len(places)
        if len(its) > room:
            buffer.insert(0, (block[room:], its[room:]))
            block, its = block[:room], its[:room]
        pixels.append(block)
        places += its
    return (pixels[0] if len(pixels) == 1 else torch.cat(pixels)), places
