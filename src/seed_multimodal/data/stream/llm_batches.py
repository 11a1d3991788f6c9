"""Batches of an LLM's training data: decoded in workers, packed in the main process, exactly resumable.

    with LlmBatches(settings, tokenizer, rank=rank, world=world, workers=2) as batches:
        batches.restore(states)                      # optional: states of all ranks
        for batch in itertools.islice(batches, 100):
            ...
        mine = batches.state()                       # position after the last batch, JSON-serializable

Draw n of a rank selects a source by a random number determined by (seed, n · world + rank), and this rank's next
positions in the source's endless order: one when packing, else those of a padded micro-batch. A rank's positions are
runs of neighbours (`Runs`), so that ranks read different parts of the shards. The state holds a few integers and the
pieces not yet packed. With the same number of processes, rows after `restore` are bit-equal; with another number,
pending draws are distributed over the new ranks: no sample is lost or used twice.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.stream.config import LlmDataSettings
from seed_multimodal.data.stream.loader import load
from seed_multimodal.data.stream.mixture import (
    BROKEN,
    TOO_LONG,
    Mixture,
    Piece,
    Read,
    add_skipped,
    merge_counts,
)
from seed_multimodal.data.stream.packing import best_fit, make_row
from seed_multimodal.data.stream.views import BatchViews, join_views, on_device
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.settings import changed_settings

CHUNKS_PER_JOB, TOGETHER_WITH_PIXELS = (
    {True: 128, False: 8},
    {True: 8, False: 1},
)  # draws decoded per job, by packing
LOOK_AHEAD = 2  # rows of tokens that packing selects from
State = Mapping[str, Any]


@dataclass
class LlmBatch:
    """A rank's micro-batch: int64 [B, L]. Labels are not shifted, as transformers' models expect; -100: no loss."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor  # from 0 in each packed sequence, and in the padding
    attention_mask: Tensor | None  # None when packed: position ids mark the boundaries
    tokens: int  # non-padding positions
    learned: int  # targets after the shift
    sequences: int
    squares: int  # sum of squared sequence lengths (cost of attention)
    views: BatchViews | None = None  # images that are input or target features (SEED-X)

    def to(self, device: str | torch.device) -> Self:
        """Copy the batch to a device."""
        return on_device(self, device)


class ChunkRange(NamedTuple):
    """Draws from a source: the first position to read, the pieces to use (None: all), and the number of draws."""

    source: int
    start: int
    pieces: list[int] | None = None
    size: int = 1


@dataclass(frozen=True)
class Runs:
    """Positions of all ranks' draws from one source: runs of `length` neighbouring draws, rank after rank.

    Before the end of the data, where no full round of runs is left, each rank's run is a single draw.
    """

    source: int
    first: int  # position of the first draw
    limit: int  # position of the end of the data
    rows: int  # positions of a draw
    length: int
    world: int

    @cached_property
    def full(self) -> int:
        """Draws of a rank in full rounds of runs."""
        draws = -(-max(0, self.limit - self.first) // self.rows)
        return draws // (self.world * self.length) * self.length

    def start(self, count: int, rank: int) -> int:
        """First position of a rank's draw number `count`."""
        if count < self.full:
            number, offset = divmod(count, self.length)
            draw = (number * self.world + rank) * self.length + offset
        else:
            draw = count * self.world + rank
        return self.first + draw * self.rows

    def end_of_round(self, count: int) -> int:
        """The number of draws of a rank up to the end of its current run."""
        return count if count >= self.full else -(-count // self.length) * self.length

    def between(self, rank: int, count: int, end: int) -> list[ChunkRange]:
        """A rank's draws from number `count` to `end`, neighbouring ones as one `Draw`."""
        draws = []
        while count < end:
            left = self.length - count % self.length if count < self.full else 1
            size = min(left, end - count)
            start = self.start(count, rank)
            if start < self.limit:
                draws.append(ChunkRange(self.source, start, None, size))
            count += size
        return draws


class ChunkOrder:
    """The draws of one rank.

    counts   draws so far from each source, at its regular positions
    firsts   position of each source when this number of processes started
    pending  draws left by an earlier number of processes, done before the regular ones of their source
    taken    pending draws done, of each source
    """

    def __init__(self, mixture: Mixture, rank: int, world: int) -> None:
        self.mixture, self.rank, self.world = mixture, rank, world
        sources = range(len(mixture.sizes))
        self.counts, self.taken = [0 for _ in sources], [0 for _ in sources]
        self.pending: list[list[ChunkRange]] = [[] for _ in sources]
        self.begin([0 for _ in sources])

    def begin(self, firsts: Sequence[int]) -> None:
        """Start the regular draws at these positions."""
        self.firsts = list(firsts)
        self.runs = _runs(self.mixture, firsts, self.world)

    def following(self) -> Iterator[ChunkRange]:
        """The draws to come, until all sources are exhausted."""
        limits, base = self.mixture.limits, sum(self.firsts)
        # Copies, because `take` alone changes this order: draws are read ahead.
        counts = list(self.counts)
        drawn = [count + taken for count, taken in zip(counts, self.taken, strict=True)]
        pending = [list(draws) for draws in self.pending]
        starts = [
            runs.start(count, self.rank) for runs, count in zip(self.runs, counts, strict=True)
        ]
        alive = [
            bool(draws) or start < limit
            for draws, start, limit in zip(pending, starts, limits, strict=True)
        ]
        total = sum(drawn)
        while True:
            source = self.mixture.choice(drawn, alive, (base + total) * self.world + self.rank)
            if source is None:
                return
            if pending[source]:
                yield pending[source][0]._replace(size=1)
                pending[source] = self._without_first(pending[source])
            else:
                yield ChunkRange(source, starts[source])
                counts[source] += 1
                starts[source] = self.runs[source].start(counts[source], self.rank)
            drawn[source] += 1
            total += 1
            alive[source] = bool(pending[source]) or starts[source] < limits[source]

    def take(self, draw: ChunkRange) -> None:
        """Advance past the next draw."""
        source = draw.source
        if self.pending[source]:
            self.pending[source] = self._without_first(self.pending[source])
            self.taken[source] += 1
        else:
            self.counts[source] += 1

    def _without_first(self, draws: list[ChunkRange]) -> list[ChunkRange]:
        """Pending draws after the first one."""
        source, start, _, size = draws[0]
        if size == 1:
            return draws[1:]
        return [ChunkRange(source, start + self.runs[source].rows, None, size - 1), *draws[1:]]

    def deal(self, states: Sequence[State]) -> None:
        """Resume from the states of another number of processes: unpacked pieces, and draws that a process has not made
        yet of the runs that were begun, are distributed over the ranks."""
        firsts = []
        for runs in _runs(self.mixture, states[0]["firsts"], len(states)):
            source = runs.source
            # What earlier changes of the number of processes left.
            draws = [
                ChunkRange(*draw) for state in states for draw in state["left"] if draw[0] == source
            ]

            # Pieces that were read but not packed.
            places = sorted(
                tuple(place) for state in states for place in state["waiting"] if place[0] == source
            )
            for (_, start), pieces in itertools.groupby(places, lambda place: place[:2]):
                draws.append(ChunkRange(source, start, [number for *_, number in pieces]))

            # The rest of each rank's current run; the new ranks' runs start behind the longest.
            end = runs.end_of_round(max(state["counts"][source] for state in states))
            for rank, state in enumerate(states):
                draws += runs.between(rank, state["counts"][source], end)

            draws.sort(key=lambda draw: draw.start)
            self.pending[source] = _share(draws, runs.rows, self.rank, self.world)
            firsts.append(runs.start(end, 0))
        self.begin(firsts)


def _runs(mixture: Mixture, firsts: Sequence[int], world: int) -> list[Runs]:
    """The positions of each source's draws."""
    return [
        Runs(
            source,
            first,
            mixture.limits[source],
            mixture.settings.chunk_shape(source)[0],
            mixture.run_length(source, world),
            world,
        )
        for source, first in enumerate(firsts)
    ]


def _share(draws: Sequence[ChunkRange], rows: int, rank: int, world: int) -> list[ChunkRange]:
    """A rank's share of draws, neighbouring ones together."""
    total = sum(draw.size for draw in draws)
    begin, end = total * rank // world, total * (rank + 1) // world
    share, number = list[ChunkRange](), 0
    for draw in draws:
        skipped = max(0, begin - number)
        stop = min(draw.size, end - number)
        if skipped < stop:
            share.append(
                ChunkRange(draw.source, draw.start + skipped * rows, draw.pieces, stop - skipped)
            )
        number += draw.size
    return share


def _read(mixture: Mixture, draws: list[ChunkRange]) -> list[tuple[ChunkRange, list[Read]]]:
    """A worker's job: the samples at each position of the draws."""
    return [(draw, mixture.read_chunk(draw.source, draw.start)) for draw in draws]


class LlmBatches(Iterator[LlmBatch], AbstractContextManager["LlmBatches"]):
    """Micro-batches of one rank until all sources are exhausted, independent of `workers` (0: none). `log` receives a
    line for the first few records skipped for each reason. Raises as `Mixture`."""

    def __init__(
        self,
        settings: LlmDataSettings,
        tokenizer: MultimodalTokenizer,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.settings, self.rank, self.world, self.workers, self.log = (
            settings,
            rank,
            world,
            workers,
            log,
        )
        self.mixture = Mixture(settings, tokenizer)
        self.mixture.check_usable()
        self.pad_id = tokenizer.pad_id
        self.draws = ChunkOrder(self.mixture, rank, world)
        self.broken = [0 for _ in settings.sources]  # consecutive broken records per source
        self.waiting: list[Piece] = []  # look-ahead of packing, oldest first
        self.positions = 0
        self.sources: list[dict[str, Any]] = [
            {"sequences": 0, "tokens": 0, "draws": 0, "skipped": {}} for _ in settings.sources
        ]
        self.wait_seconds = 0.0  # time spent in `next`
        self._open()

    def _open(self) -> None:
        """Start loading the pending draws."""
        following, pixels = self.draws.following(), any(self.mixture.readers)
        together = (TOGETHER_WITH_PIXELS if pixels else CHUNKS_PER_JOB)[self.settings.packing]
        self._loaded = load(
            partial(_read, self.mixture),
            iter(lambda: list(itertools.islice(following, together)), []),
            self.workers,
        )
        self._reads: Iterator[tuple[ChunkRange, list[Read]]] = itertools.chain.from_iterable(
            self._loaded
        )

    def __next__(self) -> LlmBatch:
        """The next batch; ranks may end some steps apart. Raises DataError: too many consecutive broken records, or a
        killed worker."""
        started = time.perf_counter()
        if self.settings.packing:
            rows = [self._row() for _ in range(self.settings.rows)]
        else:  # draws without a sequence are skipped
            rows = [[one] for one in next(filter(None, iter(self._next_draw, None)), ())]
        if not any(rows):
            raise StopIteration
        batch = self._batch(rows)
        self.wait_seconds += time.perf_counter() - started
        return batch

    def close(self) -> None:
        """Stop the workers; the next batch starts new ones."""
        self._loaded.close()
        self._open()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _next_draw(self) -> list[Piece] | None:
        """The sequences of the next draw; None at the end of the data."""
        draw, reads = next(self._reads, (None, []))
        if draw is None:
            return None
        self.draws.take(draw)
        for read in reads:
            self._count(draw.source, read)
        found = [
            one
            for read in reads
            for one in read.pieces
            if draw.pieces is None or one.number in draw.pieces
        ]
        for one in found if self.workers else ():
            if one.views is not None:  # copied, since each shared tensor keeps a file open
                one.views.pixels = one.views.pixels.clone()
        return found

    def _row(self) -> list[Piece]:
        """The sequences of the next row, oldest first; empty at the end of the data."""
        length, tokens = self.settings.length, sum(map(len, self.waiting))
        while tokens < LOOK_AHEAD * length:
            found = self._next_draw()
            if found is None:
                break
            self.waiting += found
            tokens += sum(map(len, found))
        if not self.waiting:
            return []
        chosen = set(best_fit([len(one) for one in self.waiting], length))
        row = [one for index, one in enumerate(self.waiting) if index in chosen]
        self.waiting = [one for index, one in enumerate(self.waiting) if index not in chosen]
        return row

    def _batch(self, rows: list[list[Piece]]) -> LlmBatch:
        """The batch of the given rows."""
        used, length = (
            [one for row in rows for one in row],
            self.settings.chunk_shape(rows[0][0].source)[1],
        )
        for one in used:
            self.sources[one.source]["sequences"] += 1
            self.sources[one.source]["tokens"] += len(one)
        made = [
            make_row(
                [(one.ids, one.labels) for one in row], length, self.pad_id, self.settings.packing
            )
            for row in rows
        ]
        ids, labels, positions = (
            torch.from_numpy(np.stack(arrays)).long() for arrays in zip(*made, strict=True)
        )
        mask = None
        if not self.settings.packing:
            mask = (positions < torch.tensor([len(one) for one in used])[:, None]).long()
        self.positions += ids.numel()
        return LlmBatch(
            ids,
            labels,
            positions,
            mask,
            tokens=sum(map(len, used)),
            learned=int((labels[:, 1:] != IGNORE_INDEX).sum()),
            sequences=len(used),
            squares=sum(len(one) ** 2 for one in used),
            views=join_views([[(one.views, len(one)) for one in row] for row in rows], length),
        )

    def _count(self, source: int, read: Read) -> None:
        """Update the counts for a position. Raises DataError: too many consecutive broken records."""
        counts, note, name = self.sources[source], read.note, self.settings.sources[source].name
        counts["draws"] += 1
        if read.pieces:
            self.broken[source] = 0
        if note is None:
            return
        if add_skipped(counts["skipped"], note.reason, 1, [note.location]) and self.log:
            self.log(
                f"{name}: {'' if note.kind == TOO_LONG else 'skipped: '}{note.reason}: {note.location}"
            )
        self.broken[source] += note.kind == BROKEN
        if self.broken[source] >= self.settings.max_bad_in_a_row:
            raise DataError(
                f"{self.broken[source]} consecutive records of source {name} are broken, "
                f"the last: {note.location}"
            )

    def report(self) -> dict[str, Any]:
        """`{"positions", "tokens", "sources": {name: counts}}` of this rank; a source's `sequences` and `tokens` in
        batches, `draws`, `epochs`, and `skipped` (also truncated or split): reason -> {"count", "first": records}."""
        sources = {
            source.name: {**deepcopy(counts), "epochs": counts["draws"] / size}
            for source, counts, size in zip(
                self.settings.sources, self.sources, self.mixture.sizes, strict=True
            )
        }
        return {
            "positions": self.positions,
            "tokens": sum(one["tokens"] for one in self.sources),
            "sources": sources,
        }

    def state(self) -> dict[str, Any]:
        """State for `restore` after the last batch, JSON-serializable; each rank saves its own."""
        return {
            "rank": self.rank,
            "world": self.world,
            "data": self._fingerprint(),
            "firsts": list(self.draws.firsts),
            "counts": list(self.draws.counts),
            "taken": list(self.draws.taken),
            "left": [list(draw) for draws in self.draws.pending for draw in draws],
            "waiting": [[one.source, one.position, one.number] for one in self.waiting],
            "broken": list(self.broken),
            "positions": self.positions,
            "sources": deepcopy(self.sources),
        }

    def restore(self, states: Sequence[State]) -> None:
        """Resume from the saved states of all ranks; the number of ranks, rows or workers may differ. Raises
        ConfigError: missing states, or other data or settings."""
        states = sorted(states, key=lambda state: int(state["rank"]))
        if len(states) != states[0]["world"]:
            raise ConfigError(
                f"The data state has {len(states)} ranks, but {states[0]['world']} were saved."
            )
        if "taken" not in states[0]:
            raise ConfigError(
                "The data state is of an earlier version, which read samples in another order; "
                "finish the run with that version, or start a new one from its weights."
            )
        changes = changed_settings(states[0]["data"], self._fingerprint())
        if changes:
            raise ConfigError(
                f"The data cannot be resumed; changed settings: {'; '.join(changes)}."
            )
        counted = states[self.rank :: self.world]
        if len(states) == self.world:
            mine = states[self.rank]
            self.draws.begin(mine["firsts"])
            self.draws.counts, self.draws.taken = list(mine["counts"]), list(mine["taken"])
            for draw in mine["left"]:
                self.draws.pending[draw[0]].append(ChunkRange(*draw))
            self.broken = list(mine["broken"])
            read = {
                (source, start): self.mixture.read(source, start).pieces
                for source, start, _ in mine["waiting"]
            }
            self.waiting = [
                read[source, start][number]
                for source, start, number in mine["waiting"]
                if number < len(read[source, start])
            ]
        else:
            self.draws.deal(states)
        self.positions = sum(state["positions"] for state in counted)
        for state in counted:
            for own, counts in zip(self.sources, state["sources"], strict=True):
                merge_counts(own, counts)
        self.close()

    def _fingerprint(self) -> dict[str, Any]:
        """Settings that must not change on resume; weights may."""
        keys = (
            "packing",
            "seed",
            "concat_type",
            *(("length", "too_long") if self.settings.packing else ()),
        )
        return {
            **{key: getattr(self.settings, key) for key in keys},
            **{
                f"source {source.name}": {
                    "decoder": source.decoder,
                    "cycles": source.cycles,
                    "max_length": source.max_length,
                    "number": number,
                    "records": self.mixture.sizes[number],
                    "rows": self.settings.chunk_shape(number)[0],
                }
                for number, source in enumerate(self.settings.sources)
            },
        }
