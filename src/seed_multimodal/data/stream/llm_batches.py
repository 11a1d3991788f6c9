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

from seed_multimodal.data.decoders.features import BatchViews
from seed_multimodal.data.formats.record import BadRecords, JsonObject
from seed_multimodal.data.stream.config import LlmDataSettings
from seed_multimodal.data.stream.loader import load
from seed_multimodal.data.stream.mixture import OpenedSource, ReadResult, merge_counts, open_sources
from seed_multimodal.data.stream.order import Chunks, Order, Span, share, unread
from seed_multimodal.data.stream.packing import Piece, best_fit, join_views, make_row
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


class SourceProgress:
    """What a process has read and used of a source.

    chunks: what it has yet to use.
    delivered: sequences, or micro-batches.
    counts: see `LlmBatches.report`.
    """

    def __init__(self, chunks: Chunks, skipped: BadRecords) -> None:
        self.chunks = chunks
        self.skipped = skipped
        self.delivered = 0
        self.counts: JsonObject = {
            "sequences": 0,
            "tokens": 0,
            "draws": 0,
            "skipped": skipped.counts,
        }

    def state(self) -> JsonObject:
        """For JSON."""
        return {
            "first": self.chunks.first,
            "count": self.chunks.count,
            "left": self.chunks.left,
            "delivered": self.delivered,
            "broken": self.skipped.in_a_row,
            "counts": deepcopy(self.counts),
        }


class LlmBatches(Iterator[LlmBatch], AbstractContextManager["LlmBatches"]):
    """Micro-batches of one rank until all sources are exhausted. Raises as `OpenedSource`.

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
        self.sources = open_sources(settings, tokenizer)
        for source in self.sources:
            source.check_usable(settings.max_bad_in_a_row)
        self.checksums = {source.name: source.records.checksum for source in self.sources}
        self.pad_id = tokenizer.pad_token_id
        self.order = Order(
            settings.sampling_weights(),
            [source.size for source in self.sources],
            settings.seed,
            [source.settings.cycles for source in self.sources],
            [source.order.block for source in self.sources],
            settings.concat_type,
        )
        self.progress: list[SourceProgress] = []  # of each source
        for source in self.sources:
            label = f"source {source.name}: "
            skipped = BadRecords(settings.max_bad_in_a_row, log, label)
            chunks = self.order.chunks(source.index, rank, world)
            self.progress.append(SourceProgress(chunks, skipped))
        self.waiting: list[Piece] = []  # look-ahead of packing, oldest first
        self.positions = 0
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
            delivered = [progress.delivered for progress in self.progress]
            available = [not progress.chunks.ended for progress in self.progress]
            number = sum(delivered) * self.world + self.rank
            source = self.order.choose(number, delivered, available)
            if source is None:
                return []
            pieces = self._usable_records(source)
            if pieces:
                self.progress[source].delivered += 1
                return pieces

    def _usable_records(self, source: int) -> list[Piece]:
        """The sequences of the next usable records of a source: one, or the rows of a micro-batch.

        Fewer at the source's end. Raises DataError: too many consecutive broken records.
        """
        if self._reader is None:
            chunks = [progress.chunks for progress in self.progress]
            self._reader = RecordQueues(self.sources, chunks, self.order, self.workers)
        progress = self.progress[source]
        pieces: list[Piece] = []
        n_usable = 0
        while n_usable < self.sources[source].rows:
            result = self._reader.next(source)
            if result is None:
                break
            progress.chunks.take()
            progress.counts["draws"] += 1
            if result.pieces:
                n_usable += 1
                progress.skipped.usable()
            if result.note is not None:
                progress.skipped.add(result.note)
            pieces += result.pieces
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
            counts = self.progress[piece.source].counts
            counts["sequences"] += 1
            counts["tokens"] += len(piece)

        # 1. Rows of int32 arrays [L] → int64 tensors [B, L].
        length = self.sources[rows[0][0].source].length
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

    def report(self) -> JsonObject:
        """Counts of this rank: `{"positions", "tokens", "sources": {name: counts}}`.

        A source has `sequences` and `tokens` in batches, `draws` (records read), `epochs`, and
        `skipped` (also truncated or split): reason -> {"count", "first": records}.
        """
        sources = {}
        for source, progress in zip(self.sources, self.progress, strict=True):
            counts = deepcopy(progress.counts)
            sources[source.name] = {**counts, "epochs": counts["draws"] / source.size}
        return {
            "positions": self.positions,
            "tokens": sum(counts["tokens"] for counts in sources.values()),
            "sources": sources,
        }

    def state(self) -> JsonObject:
        """State for `restore` after the last batch, JSON-serializable; each rank saves its own."""
        return {
            "rank": self.rank,
            "world": self.world,
            "data": self._fingerprint(),
            "checksums": self.checksums,
            "waiting": [[piece.source, piece.position, piece.index] for piece in self.waiting],
            "positions": self.positions,
            "sources": [progress.state() for progress in self.progress],
        }

    def restore(self, states: Sequence[State]) -> None:
        """Resume from the saved states of all ranks.

        The number of ranks, rows or workers may differ. Raises ConfigError: missing states, or
        other data or settings.
        """
        states = sorted(states, key=lambda state: int(state["rank"]))
        self._check_states(states)
        self.close()
        counted = states[self.rank :: self.world]  # each rank's counts go to one of the new ranks
        self.positions = sum(state["positions"] for state in counted)
        for source, progress in enumerate(self.progress):
            for state in counted:
                merge_counts(progress.counts, state["sources"][source]["counts"])
            if len(states) == self.world:
                saved = states[self.rank]["sources"][source]
                progress.chunks = self._saved_chunks(states[self.rank], source)
                progress.delivered = saved["delivered"]
                progress.skipped.in_a_row = saved["broken"]
            else:
                self._redistribute(states, source)
        self.waiting = []
        if len(states) == self.world:
            self.waiting = self._read_again(states[self.rank]["waiting"])

    def _check_states(self, states: Sequence[State]) -> None:
        """Raise ConfigError: missing states, or other data or settings."""
        if len(states) != states[0]["world"]:
            raise ConfigError(
                f"The data state has {len(states)} ranks, but {states[0]['world']} were saved."
            )
        # Earlier versions saved no checksums.
        saved = {"checksums": states[0].get("checksums", self.checksums), **states[0]["data"]}
        changes = changed_settings(saved, {"checksums": self.checksums, **self._fingerprint()})
        if changes:
            raise ConfigError(
                f"The data cannot be resumed; changed settings: {'; '.join(changes)}."
            )

    def _read_again(self, waiting: Sequence[Sequence[int]]) -> list[Piece]:
        """Pieces by source, position and index."""
        results: dict[tuple[int, int], list[Piece]] = {}  # by source and position
        pieces: list[Piece] = []
        for source, position, index in waiting:
            if (source, position) not in results:
                results[source, position] = self.sources[source].read(position).pieces
            # A record that cannot be read any more has none.
            pieces += results[source, position][index : index + 1]
        return pieces

    def _redistribute(self, states: Sequence[State], source: int) -> None:
        """Divide what another number of ranks has not used of a source."""
        waiting: dict[int, list[int]] = {}  # pieces by position
        for state in states:
            for piece_source, position, index in state["waiting"]:
                if piece_source == source:
                    waiting.setdefault(position, []).append(index)
        read = [Span(position, position + 1, pieces) for position, pieces in waiting.items()]
        first, spans = unread([self._saved_chunks(state, source) for state in states], read)
        progress = self.progress[source]
        progress.chunks = self.order.chunks(source, self.rank, self.world, first)
        progress.chunks.left = share(spans, self.rank, self.world)
        # Equal in all ranks, whose units are numbered together.
        delivered = sum(state["sources"][source]["delivered"] for state in states)
        progress.delivered = delivered // self.world

    def _saved_chunks(self, state: State, source: int) -> Chunks:
        """The positions of the rank that saved a state."""
        saved = state["sources"][source]
        chunks = self.order.chunks(source, state["rank"], state["world"], saved["first"])
        chunks.count = saved["count"]
        chunks.left = [Span(*span) for span in saved["left"]]
        return chunks

    def _fingerprint(self) -> JsonObject:
        """Settings that must not change on resume; weights may."""
        keys = ["packing", "seed", "concat_type"]
        if self.settings.packing:
            keys += ["length", "too_long"]
        fingerprint: JsonObject = {key: getattr(self.settings, key) for key in keys}
        for source in self.sources:
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

    def __init__(
        self, sources: Sequence[OpenedSource], chunks: Sequence[Chunks], order: Order, workers: int
    ) -> None:
        self.workers = workers
        self.unread = deepcopy(chunks)
        self.queues: list[deque[ReadResult]] = [deque() for _ in chunks]
        self.n_ahead = [0] * len(chunks)  # records of each source that are read or being read
        # How many records of each source are used, relatively.
        self.needs: list[float] = [source.rows for source in sources]
        if order.turns == "sample":
            self.needs = [
                need * weight for need, weight in zip(self.needs, order.weights, strict=True)
            ]
        has_pixels = any(source.has_pixels for source in sources)
        self.job_size = PIXEL_RECORDS_PER_JOB if has_pixels else RECORDS_PER_JOB
        self.results = load(partial(_read_job, sources), self._jobs(), workers)

    def next(self, source: int) -> ReadResult | None:
        """The next record of a source; None: there is none."""
        queue = self.queues[source]
        while not queue:
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
            spans = self.unread[source].take_all(self.job_size)
            self.n_ahead[source] += sum(span.size for span in spans)
            yield source, spans

    def _supply(self, source: int) -> tuple[float, float]:
        """How long the records of a source last that were read ahead; of equals, the most used."""
        return self.n_ahead[source] / self.needs[source], -self.needs[source]


def _read_job(sources: Sequence[OpenedSource], job: Job) -> tuple[int, list[ReadResult]]:
    """A worker's job: the records at some positions of a source."""
    source, spans = job
    return source, list(chain.from_iterable(map(sources[source].read_span, spans)))
