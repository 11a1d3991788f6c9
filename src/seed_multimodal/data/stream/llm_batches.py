"""Batches of an LLM's training data: decoded in workers, packed in the main process, exactly
resumable.

    with LlmBatches(settings, tokenizer, rank=rank, world=world, workers=2) as batches:
        batches.restore(states)                      # optional: states of all ranks
        for batch in itertools.islice(batches, 100):
            ...
        mine = batches.state()                       # position after the last batch, for JSON

Sources are drawn for what is delivered (`order.Order`): a packed sequence, or a padded micro-batch
of usable records. The records of each source are read in their own order, ahead of their use.

The state holds a few integers and the pieces not yet packed. With the same number of processes,
rows after `restore` are bit-equal; with another number, unread positions are distributed over the
new ranks: no sample is lost or used twice.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.formats.record import BROKEN, BadRecords, JsonObject
from seed_multimodal.data.stream.config import LlmDataSettings
from seed_multimodal.data.stream.loader import load
from seed_multimodal.data.stream.mixture import (
    Mixture,
    ReadResult,
    merge_counts,
)
from seed_multimodal.data.stream.order import Chunks, Span, share, unread
from seed_multimodal.data.stream.packing import Piece, best_fit, join_views, make_row
from seed_multimodal.data.stream.views import BatchViews
from seed_multimodal.device import copy_to
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.settings import changed_settings

RECORDS_PER_JOB = 128  # read by a worker at once
PIXEL_RECORDS_PER_JOB = 8  # with images
LOOK_AHEAD = 2  # rows of tokens that packing selects from
State = Mapping[str, Any]
Job = tuple[int, list[Span]]  # source and positions


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

    def to(self, device: torch.device) -> Self:
        """The batch without its views, on a device."""
        if device.type == "cpu":
            return replace(self, views=None)
        tensors = {
            name: copy_to(device, value)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors, views=None)


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
        self.mixture = Mixture(settings, tokenizer)
        self.mixture.check_usable()
        self.pad_id = tokenizer.pad_token_id
        self.order = self.mixture.order
        self.chunks = self.order.chunks(rank, world)  # what this rank has yet to use
        self.delivered = [0] * len(settings.sources)  # sequences or micro-batches of each source
        self.skipped = [
            BadRecords(settings.max_bad_in_a_row, log, f"source {source.name}: ")
            for source in settings.sources
        ]
        self.waiting: list[Piece] = []  # look-ahead of packing, oldest first
        self.positions = 0
        # Counts of each source, see `report`.
        self.sources: list[JsonObject] = [
            {"sequences": 0, "tokens": 0, "draws": 0, "skipped": skipped.counts}
            for skipped in self.skipped
        ]
        self.wait_seconds = 0.0  # time spent in `next`
        self._reader: RecordQueues | None = None  # None: workers are stopped

    def __next__(self) -> LlmBatch:
        """The next batch; ranks may end some steps apart.

        Raises DataError: too many consecutive broken records, or a killed worker.
        """
        started = time.perf_counter()
        if self.settings.packing:
            rows = [self._packed_row() for _ in range(self.settings.rows)]
        else:
            rows = [[piece] for piece in self._next_unit()]
        if not any(rows):
            raise StopIteration
        batch = self._batch(rows)
        self.wait_seconds += time.perf_counter() - started
        return batch

    def close(self) -> None:
        """Stop the workers; the next batch starts new ones."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def __exit__(self, *error: object) -> None:
        self.close()

    def _next_unit(self) -> list[Piece]:
        """The sequences of the next record or padded micro-batch; empty at the end of the data."""
        while True:
            number = sum(self.delivered) * self.world + self.rank
            available = [not chunks.ended for chunks in self.chunks]
            source = self.order.choose(number, self.delivered, available)
            if source is None:
                return []
            pieces = self._usable_records(source)
            if pieces:
                self.delivered[source] += 1
                return pieces

    def _usable_records(self, source: int) -> list[Piece]:
        """The sequences of the next usable records of a source: one, or the rows of a micro-batch.

        Fewer at the source's end.
        """
        if self._reader is None:
            self._reader = RecordQueues(self.mixture, self.chunks, self.workers)
        pieces: list[Piece] = []
        n_usable = 0
        while n_usable < self.mixture.sources[source].rows:
            result = self._reader.next(source)
            if result is None:
                break
            self.chunks[source].take()
            self._count(source, result)
            pieces += result.pieces
            n_usable += bool(result.pieces)
        return pieces

    def _packed_row(self) -> list[Piece]:
        """The sequences of the next row, oldest first; empty at the end of the data."""
        # 1. Fill the look-ahead.
        length = self.settings.length
        tokens = sum(map(len, self.waiting))
        while tokens < LOOK_AHEAD * length:
            pieces = self._next_unit()
            if not pieces:
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
        pieces = list(chain.from_iterable(rows))
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
        self.sources[source]["draws"] += 1
        skipped = self.skipped[source]
        if result.pieces:
            skipped.usable()
        note = result.note
        if note is None:
            return
        if note.kind == BROKEN:
            skipped.broken(note.reason, note.location)
        else:
            skipped.count(note.reason, note.location)

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
            "firsts": [chunks.first for chunks in self.chunks],
            "counts": [chunks.count for chunks in self.chunks],
            "left": [chunks.left for chunks in self.chunks],
            "delivered": list(self.delivered),
            "waiting": [[piece.source, piece.position, piece.index] for piece in self.waiting],
            "broken": [skipped.in_a_row for skipped in self.skipped],
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

        # 1. The positions, and the look-ahead of the same number of ranks.
        self.close()
        if len(states) == self.world:
            self._restore_own(states[self.rank])
        else:
            self._redistribute(states)

        # 2. Counts: each saved rank's go to one of the new ranks.
        counted = states[self.rank :: self.world]
        self.positions = sum(state["positions"] for state in counted)
        for state in counted:
            for counts, saved in zip(self.sources, state["sources"], strict=True):
                merge_counts(counts, saved)

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
        self.chunks = self._saved_chunks(state)
        self.delivered = list(state["delivered"])
        for skipped, in_a_row in zip(self.skipped, state["broken"], strict=True):
            skipped.in_a_row = in_a_row

        pieces: dict[tuple[int, int], list[Piece]] = {}  # by source and position
        self.waiting = []
        for source, position, index in state["waiting"]:
            if (source, position) not in pieces:
                pieces[source, position] = self.mixture.sources[source].read(position).pieces
            # A record that cannot be read any more has none.
            self.waiting += pieces[source, position][index : index + 1]

    def _redistribute(self, states: Sequence[State]) -> None:
        """Resume from the states of another number of ranks: what they have not used is divided."""
        before = [self._saved_chunks(state) for state in states]
        waiting: dict[tuple[int, int], list[int]] = {}  # pieces by source and position
        for state in states:
            for source, position, index in state["waiting"]:
                waiting.setdefault((source, position), []).append(index)

        firsts = []
        shares = []
        for source in range(len(self.chunks)):
            read = [
                Span(position, position + 1, pieces)
                for (piece_source, position), pieces in waiting.items()
                if piece_source == source
            ]
            first, spans = unread([chunks[source] for chunks in before], read)
            firsts.append(first)
            shares.append(share(spans, self.rank, self.world))
        self.chunks = self.order.chunks(self.rank, self.world, firsts)
        for chunks, spans in zip(self.chunks, shares, strict=True):
            chunks.left = spans
        # Equal in all ranks, whose units are numbered together.
        counts = np.sum([state["delivered"] for state in states], axis=0)
        self.delivered = (counts // self.world).tolist()

    def _saved_chunks(self, state: State) -> list[Chunks]:
        """The positions of the rank that saved a state."""
        saved = self.order.chunks(state["rank"], state["world"], state["firsts"])
        for chunks, count, left in zip(saved, state["counts"], state["left"], strict=True):
            chunks.count = count
            chunks.left = [Span(*span) for span in left]
        return saved

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


class RecordQueues:
    """The records of each source, in order, which workers read ahead of their use.

    The order in which sources are read ahead changes no result, only how long `next` waits.
    """

    def __init__(self, mixture: Mixture, chunks: Sequence[Chunks], workers: int) -> None:
        self.mixture = mixture
        self.workers = workers
        self.unread = deepcopy(list(chunks))
        self.queues: list[deque[ReadResult]] = [deque() for _ in chunks]
        self.n_ahead = [0] * len(chunks)  # records of each source that are read or being read
        self.wanted = 0  # source of the record that is waited for
        self.weights = mixture.order.weights
        if mixture.order.turns != "sample":
            self.weights = [1.0] * len(chunks)
        has_pixels = any(source.reader for source in mixture.sources)
        self.job_size = PIXEL_RECORDS_PER_JOB if has_pixels else RECORDS_PER_JOB
        self.results = load(partial(_read_job, mixture), self._jobs(), workers)

    def next(self, source: int) -> ReadResult | None:
        """The next record of a source; None: there is none."""
        queue = self.queues[source]
        while not queue:
            self.wanted = source
            if not self.n_ahead[source] and self.unread[source].ended:
                return None
            job_source, results = next(self.results)
            # Pixels from workers are copied, since each shared tensor keeps a file open.
            if self.workers:
                for piece in chain.from_iterable(result.pieces for result in results):
                    if piece.views is not None:
                        piece.views.pixels = piece.views.pixels.clone()
            self.queues[job_source] += results
        result = queue.popleft()
        self.n_ahead[source] -= 1
        return result

    def close(self) -> None:
        """Stop the workers."""
        self.results.close()

    def _jobs(self) -> Iterator[Job]:
        """Jobs of the workers, until all sources are read."""
        while True:
            sources = [source for source, chunks in enumerate(self.unread) if not chunks.ended]
            if not sources:
                return
            source = min(sources, key=self._supply)
            if self.wanted in sources and not self.n_ahead[self.wanted]:
                source = self.wanted
            spans = self.unread[source].take_all(self.job_size)
            self.n_ahead[source] += sum(span.size for span in spans)
            yield source, spans

    def _supply(self, source: int) -> tuple[float, float]:
        """How long the records of a source last that were read ahead; of equals, the most used."""
        need = self.weights[source] * self.mixture.sources[source].rows
        return self.n_ahead[source] / need, -need


def _read_job(mixture: Mixture, job: Job) -> tuple[int, list[ReadResult]]:
    """A worker's job: the records at some positions of a source."""
    source, spans = job
    return source, list(chain.from_iterable(mixture.read(source, span) for span in spans))
