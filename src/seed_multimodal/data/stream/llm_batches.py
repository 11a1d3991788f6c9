"""Batches of an LLM's training data: decoded in workers, packed in the main process, exactly
resumable.

    with LlmBatches(settings, tokenizer, rank=rank, world=world, workers=2) as batches:
        batches.restore(states)                      # optional: states of all ranks
        for batch in itertools.islice(batches, 100):
            ...
        mine = batches.state()                       # position after the last batch, for JSON

A chunk is what is read from a source at once: one record when packing, else the records of a padded
micro-batch. Chunk n of a rank comes from a source that is chosen by (seed, n · world + rank), at
this rank's next positions in the source's endless order. A rank's positions are runs of neighbours
(`RunLayout`), so that ranks read different parts of the shards.

The state holds a few integers and the pieces not yet packed. With the same number of processes,
rows after `restore` are bit-equal; with another number, pending chunks are distributed over the new
ranks: no sample is lost or used twice.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.formats.record import JsonObject
from seed_multimodal.data.stream.config import LlmDataSettings
from seed_multimodal.data.stream.loader import load
from seed_multimodal.data.stream.mixture import (
    BROKEN,
    REPAIRED,
    TOO_LONG,
    Mixture,
    Piece,
    ReadResult,
    add_skipped,
    merge_counts,
)
from seed_multimodal.data.stream.packing import best_fit, make_row
from seed_multimodal.data.stream.views import BatchViews, join_views, on_device
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.settings import changed_settings

CHUNKS_PER_JOB = {True: 128, False: 8}  # read by a worker at once, by `packing`
CHUNKS_PER_JOB_WITH_PIXELS = {True: 8, False: 1}
LOOK_AHEAD = 2  # rows of tokens that packing selects from
State = Mapping[str, Any]


@dataclass
class LlmBatch:
    """A rank's micro-batch: int64 [B, L].

    Labels are not shifted, as transformers' models expect; -100: no loss.
    """

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
    """Neighbouring chunks of a source."""

    source: int
    start: int  # position of the first record
    pieces: list[int] | None = None  # pieces of its record to use; None: all
    size: int = 1  # number of chunks


ReadChunk = tuple[ChunkRange, list[ReadResult]]  # a single chunk, and its records


@dataclass(frozen=True)
class RunLayout:
    """Positions of all ranks' chunks of one source: runs of `length` neighbouring chunks, rank
    after rank.

    Before the end of the data, where no full round of runs is left, each rank's run is a single
    chunk.
    """

    source: int
    first: int  # position of the first chunk
    limit: int  # position of the end of the data
    rows: int  # positions of a chunk
    length: int
    world: int

    @cached_property
    def full(self) -> int:
        """Chunks of a rank in full rounds of runs."""
        n_chunks = -(-max(0, self.limit - self.first) // self.rows)
        return n_chunks // (self.world * self.length) * self.length

    def start(self, count: int, rank: int) -> int:
        """First position of a rank's chunk number `count`."""
        if count < self.full:
            run, offset = divmod(count, self.length)
            chunk = (run * self.world + rank) * self.length + offset
        else:
            chunk = count * self.world + rank
        return self.first + chunk * self.rows

    def end_of_round(self, count: int) -> int:
        """The number of chunks of a rank up to the end of its current run."""
        return count if count >= self.full else -(-count // self.length) * self.length

    def between(self, rank: int, count: int, end: int) -> list[ChunkRange]:
        """A rank's chunks from number `count` to `end`, neighbouring ones as one range."""
        ranges = []
        while count < end:
            remaining = self.length - count % self.length if count < self.full else 1
            size = min(remaining, end - count)
            start = self.start(count, rank)
            if start < self.limit:
                ranges.append(ChunkRange(self.source, start, None, size))
            count += size
        return ranges


@dataclass
class SourceCursor:
    """A rank's position in the chunks of one source.

    pending: chunks left by another number of processes, read before the regular ones.
    """

    runs: RunLayout
    rank: int
    count: int = 0  # regular chunks so far
    taken: int = 0  # pending chunks so far
    pending: list[ChunkRange] = field(default_factory=list)

    def next_chunk(self) -> ChunkRange | None:
        """The next chunk; None: the source is exhausted."""
        if self.pending:
            return self.pending[0]._replace(size=1)
        start = self.runs.start(self.count, self.rank)
        return ChunkRange(self.runs.source, start) if start < self.runs.limit else None

    def advance(self) -> None:
        """Pass the next chunk."""
        if not self.pending:
            self.count += 1
            return
        first, *remaining = self.pending
        self.taken += 1
        if first.size > 1:
            start = first.start + self.runs.rows
            remaining.insert(0, ChunkRange(first.source, start, None, first.size - 1))
        self.pending = remaining


class ChunkOrder:
    """The chunks of one rank; `cursors` has its position in each source."""

    def __init__(self, mixture: Mixture, rank: int, world: int) -> None:
        self.mixture = mixture
        self.rank = rank
        self.world = world
        self.begin([0] * len(mixture.sizes))

    def begin(self, firsts: Sequence[int]) -> None:
        """Start the regular chunks of the sources at these positions."""
        self.cursors = [
            SourceCursor(runs, self.rank) for runs in _run_layouts(self.mixture, firsts, self.world)
        ]

    def following(self) -> Iterator[ChunkRange]:
        """The chunks to come, until all sources are exhausted."""
        # Copies, because only `take` advances this order: chunks are read ahead.
        cursors = [replace(cursor) for cursor in self.cursors]
        chunks = [cursor.next_chunk() for cursor in cursors]
        totals = [cursor.count + cursor.taken for cursor in cursors]

        # Chunks of all ranks and sources are numbered, so that no two ranks use the same random
        # number.
        n_chunks = sum(cursor.runs.first for cursor in cursors) + sum(totals)
        while True:
            available = [chunk is not None for chunk in chunks]
            index = n_chunks * self.world + self.rank
            source = self.mixture.choose_source(totals, available, index)
            if source is None:
                return
            chunk = chunks[source]
            assert chunk is not None
            yield chunk
            cursors[source].advance()
            chunks[source] = cursors[source].next_chunk()
            totals[source] += 1
            n_chunks += 1

    def take(self, chunk: ChunkRange) -> None:
        """Pass the next chunk of `following`."""
        self.cursors[chunk.source].advance()

    def state(self) -> dict[str, list[Any]]:
        """The position, JSON-serializable; each list but `left` has one entry for each source."""
        left = itertools.chain.from_iterable(cursor.pending for cursor in self.cursors)
        return {
            "firsts": [cursor.runs.first for cursor in self.cursors],
            "counts": [cursor.count for cursor in self.cursors],
            "taken": [cursor.taken for cursor in self.cursors],
            "left": [list(chunks) for chunks in left],
        }

    def restore(self, state: State) -> None:
        """Resume from this rank's state."""
        self.begin(state["firsts"])
        for cursor, count, taken in zip(self.cursors, state["counts"], state["taken"], strict=True):
            cursor.count = count
            cursor.taken = taken
        for saved in state["left"]:
            chunks = ChunkRange(*saved)
            self.cursors[chunks.source].pending.append(chunks)

    def redistribute(self, states: Sequence[State]) -> None:
        """Resume from the states of another number of processes.

        Pieces that were not packed, and chunks of the runs that were begun but not read, are
        distributed over the ranks.
        """
        firsts: list[int] = []
        shares: list[list[ChunkRange]] = []
        for runs in _run_layouts(self.mixture, states[0]["firsts"], len(states)):
            # 1. What earlier changes of the number of processes left, and the unread part of each
            #    rank's current run. The new ranks' runs start behind the longest.
            source = runs.source
            end = runs.end_of_round(max(state["counts"][source] for state in states))
            ranges: list[ChunkRange] = []
            waiting: list[tuple[int, int]] = []  # position and index of pieces not packed
            for rank, state in enumerate(states):
                ranges += [ChunkRange(*saved) for saved in state["left"] if saved[0] == source]
                ranges += runs.between(rank, state["counts"][source], end)
                waiting += [tuple(piece[1:]) for piece in state["waiting"] if piece[0] == source]

            # 2. Pieces that were read but not packed, by their record.
            for start, pieces in itertools.groupby(sorted(waiting), lambda piece: piece[0]):
                ranges.append(ChunkRange(source, start, [index for _, index in pieces]))

            # 3. This rank's share.
            ranges.sort(key=lambda chunk: chunk.start)
            shares.append(_share(ranges, runs.rows, self.rank, self.world))
            firsts.append(runs.start(end, 0))
        self.begin(firsts)
        for cursor, share in zip(self.cursors, shares, strict=True):
            cursor.pending = share


def _run_layouts(mixture: Mixture, firsts: Sequence[int], world: int) -> list[RunLayout]:
    """The positions of each source's chunks."""
    return [
        RunLayout(
            source.index,
            first,
            source.limit,
            source.rows,
            source.run_length(world),
            world,
        )
        for source, first in zip(mixture.sources, firsts, strict=True)
    ]


def _share(ranges: Sequence[ChunkRange], rows: int, rank: int, world: int) -> list[ChunkRange]:
    """A rank's share of chunks, neighbouring ones together; `rows`: positions of a chunk."""
    total = sum(chunks.size for chunks in ranges)
    begin = total * rank // world
    end = total * (rank + 1) // world
    share = []
    n_before = 0  # chunks before this range
    for chunks in ranges:
        skipped = max(0, begin - n_before)
        stop = min(chunks.size, end - n_before)
        if skipped < stop:
            start = chunks.start + skipped * rows
            share.append(ChunkRange(chunks.source, start, chunks.pieces, stop - skipped))
        n_before += chunks.size
    return share


class LlmBatches(Iterator[LlmBatch], AbstractContextManager["LlmBatches"]):
    """Micro-batches of one rank until all sources are exhausted. Raises as `Mixture`.

    workers: processes that read and decode (0: this one); the batches do not depend on their
        number.
    log: receives a line for the first few records skipped for each reason.
    """

    def __init__(
        self,
        settings: LlmDataSettings,
        tokenizer: TextTokenizer,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.settings = settings
        self.rank = rank
        self.world = world
        self.workers = workers
        self.log = log
        self.mixture = Mixture(settings, tokenizer)
        self.mixture.check_usable()
        self.pad_id = tokenizer.pad_token_id
        self.order = ChunkOrder(self.mixture, rank, world)
        self.broken = [0] * len(settings.sources)  # consecutive broken records per source
        self.waiting: list[Piece] = []  # look-ahead of packing, oldest first
        self.positions = 0
        # Counts of each source, see `report`.
        self.sources: list[JsonObject] = [
            {"sequences": 0, "tokens": 0, "draws": 0, "skipped": {}} for _ in settings.sources
        ]
        self.wait_seconds = 0.0  # time spent in `next`
        self._chunks: Generator[ReadChunk, None, None] | None = None  # None: workers are stopped

    def _load_chunks(self) -> Generator[ReadChunk, None, None]:
        """The chunks to come, read by the workers; `close` stops them."""
        has_pixels = any(source.reader for source in self.mixture.sources)
        sizes = CHUNKS_PER_JOB_WITH_PIXELS if has_pixels else CHUNKS_PER_JOB
        jobs = _jobs(self.order.following(), sizes[self.settings.packing])
        with closing(load(partial(_read_job, self.mixture), jobs, self.workers)) as results:
            for chunks in results:
                yield from chunks

    def __next__(self) -> LlmBatch:
        """The next batch; ranks may end some steps apart.

        Raises DataError: too many consecutive broken records, or a killed worker.
        """
        started = time.perf_counter()
        if self.settings.packing:
            rows = [self._packed_row() for _ in range(self.settings.rows)]
        else:
            rows = [[piece] for piece in self._next_usable_chunk()]
        if not any(rows):
            raise StopIteration
        batch = self._batch(rows)
        self.wait_seconds += time.perf_counter() - started
        return batch

    def close(self) -> None:
        """Stop the workers; the next batch starts new ones."""
        if self._chunks is not None:
            self._chunks.close()
        self._chunks = None

    def __exit__(self, *error: object) -> None:
        self.close()

    def _next_chunk(self) -> list[Piece] | None:
        """The sequences of the next chunk; None at the end of the data."""
        if self._chunks is None:
            self._chunks = self._load_chunks()
        chunk, results = next(self._chunks, (None, []))
        if chunk is None:
            return None
        self.order.take(chunk)
        pieces = []
        for result in results:
            self._count(chunk.source, result)
            for piece in result.pieces:
                if chunk.pieces is None or piece.index in chunk.pieces:
                    pieces.append(piece)

        # Pixels from workers are copied, since each shared tensor keeps a file open.
        if self.workers:
            for piece in pieces:
                if piece.views is not None:
                    piece.views.pixels = piece.views.pixels.clone()
        return pieces

    def _next_usable_chunk(self) -> list[Piece]:
        """The sequences of the next chunk that has any; empty at the end of the data."""
        pieces = self._next_chunk()
        while pieces is not None and not pieces:
            pieces = self._next_chunk()
        return pieces or []

    def _packed_row(self) -> list[Piece]:
        """The sequences of the next row, oldest first; empty at the end of the data."""
        # 1. Fill the look-ahead.
        length = self.settings.length
        tokens = sum(map(len, self.waiting))
        while tokens < LOOK_AHEAD * length:
            pieces = self._next_chunk()
            if pieces is None:
                break
            self.waiting += pieces
            tokens += sum(map(len, pieces))
        if not self.waiting:
            return []

        # 2. Take what fills the row best, always with the oldest.
        chosen = best_fit(list(map(len, self.waiting)), length)
        row = [self.waiting[index] for index in chosen]
        for index in reversed(chosen):
            del self.waiting[index]
        return row

    def _batch(self, rows: list[list[Piece]]) -> LlmBatch:
        """The batch of B rows of pieces."""
        packing = self.settings.packing
        pieces = list(itertools.chain.from_iterable(rows))
        lengths = list(map(len, pieces))
        for piece in pieces:
            counts = self.sources[piece.source]
            counts["sequences"] += 1
            counts["tokens"] += len(piece)

        # 1. Rows of int32 arrays [L] → int64 tensors [B, L].
        length = self.mixture.sources[rows[0][0].source].length
        arrays = []
        for row in rows:
            sequences = [(piece.ids, piece.labels) for piece in row]
            arrays.append(make_row(sequences, length, self.pad_id, packing))
        arrays_3BL = np.stack(arrays, axis=1)
        input_ids, labels, position_ids = torch.from_numpy(arrays_3BL).long()
        self.positions += input_ids.numel()

        # 2. Padded rows hold one sequence each, whose end the mask marks.
        mask = None
        if not packing:
            mask = (position_ids < torch.tensor(lengths)[:, None]).long()

        # 3. Images, and what the metrics need.
        views = join_views(rows, length)
        return LlmBatch(
            input_ids,
            labels,
            position_ids,
            mask,
            tokens=sum(lengths),
            learned=int((labels[:, 1:] != IGNORE_INDEX).sum()),
            sequences=len(pieces),
            squares=sum(n_tokens**2 for n_tokens in lengths),
            views=views,
        )

    def _count(self, source: int, result: ReadResult) -> None:
        """Update the counts for a position.

        Raises DataError: too many consecutive broken records.
        """
        counts = self.sources[source]
        counts["draws"] += 1
        if result.pieces:
            self.broken[source] = 0
        note = result.note
        if note is None:
            return
        name = self.settings.sources[source].name
        is_listed = add_skipped(counts["skipped"], note.reason, 1, [note.location])
        if is_listed and self.log:
            action = "" if note.kind in (TOO_LONG, REPAIRED) else "skipped: "
            self.log(f"{name}: {action}{note.reason}: {note.location}")
        self.broken[source] += note.kind == BROKEN
        if self.broken[source] >= self.settings.max_bad_in_a_row:
            raise DataError(
                f"{self.broken[source]} consecutive records of source {name} are broken, "
                f"the last: {note.location}"
            )

    def report(self) -> JsonObject:
        """Counts of this rank: `{"positions", "tokens", "sources": {name: counts}}`.

        A source has `sequences` and `tokens` in batches, `draws` (records read), `epochs`, and
        `skipped` (also truncated or split): reason -> {"count", "first": records}.
        """
        sources = {}
        for source, counts in zip(self.mixture.sources, self.sources, strict=True):
            sources[source.name] = {**deepcopy(counts), "epochs": counts["draws"] / source.size}
        return {
            "positions": self.positions,
            "tokens": sum(counts["tokens"] for counts in self.sources),
            "sources": sources,
        }

    def state(self) -> JsonObject:
        """State for `restore` after the last batch, JSON-serializable; each rank saves its own."""
        return {
            "rank": self.rank,
            "world": self.world,
            "data": self._fingerprint(),
            **self.order.state(),
            "waiting": [[piece.source, piece.position, piece.index] for piece in self.waiting],
            "broken": list(self.broken),
            "positions": self.positions,
            "sources": deepcopy(self.sources),
        }

    def restore(self, states: Sequence[State]) -> None:
        """Resume from the saved states of all ranks.

        The number of ranks, rows or workers may differ. Raises ConfigError: missing states, or
        other data or settings.
        """
        states = sorted(states, key=lambda state: int(state["rank"]))
        self._check_states(states)

        # 1. The order, and the look-ahead of the same number of ranks.
        if len(states) == self.world:
            self._restore_own(states[self.rank])
        else:
            self.order.redistribute(states)

        # 2. Counts: each saved rank's go to one of the new ranks.
        counted = states[self.rank :: self.world]
        self.positions = sum(state["positions"] for state in counted)
        for state in counted:
            for counts, saved in zip(self.sources, state["sources"], strict=True):
                merge_counts(counts, saved)
        self.close()

    def _check_states(self, states: Sequence[State]) -> None:
        """Raise ConfigError: missing states, or other data or settings."""
        if len(states) != states[0]["world"]:
            raise ConfigError(
                f"The data state has {len(states)} ranks, but {states[0]['world']} were saved."
            )
        changes = changed_settings(states[0]["data"], self._fingerprint())
        if changes:
            raise ConfigError(
                f"The data cannot be resumed; changed settings: {'; '.join(changes)}."
            )

    def _restore_own(self, state: State) -> None:
        """Resume from this rank's state; the pieces that were not packed are read again."""
        self.order.restore(state)
        self.broken = list(state["broken"])

        pieces: dict[tuple[int, int], list[Piece]] = {}  # by source and position
        self.waiting = []
        for source, position, index in state["waiting"]:
            if (source, position) not in pieces:
                pieces[source, position] = self.mixture.sources[source].read(position).pieces
            # A record that cannot be read any more has none.
            self.waiting += pieces[source, position][index : index + 1]

    def _fingerprint(self) -> JsonObject:
        """Settings that must not change on resume; weights may."""
        keys = ["packing", "seed", "concat_type"]
        if self.settings.packing:
            keys += ["length", "too_long"]
        fingerprint: JsonObject = {key: getattr(self.settings, key) for key in keys}
        for source in self.mixture.sources:
            fingerprint[f"source {source.name}"] = {
                "decoder": source.settings.decoder,
                "cycles": source.settings.cycles,
                "max_length": source.settings.max_length,
                "number": source.index,
                "records": source.size,
                "rows": source.rows,
            }
        return fingerprint


def _jobs(chunks: Iterator[ChunkRange], size: int) -> Iterator[list[ChunkRange]]:
    """Up to `size` chunks for each job of a worker."""
    job = list(itertools.islice(chunks, size))
    while job:
        yield job
        job = list(itertools.islice(chunks, size))


def _read_job(mixture: Mixture, chunks: list[ChunkRange]) -> list[ReadChunk]:
    """A worker's job: the records of its chunks."""
    return [(chunk, mixture.read_chunk(chunk.source, chunk.start)) for chunk in chunks]
