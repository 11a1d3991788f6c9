"""Usable samples of sources for one process: alternated by weight, read ahead by workers, exactly
resumable.

    stream = Stream(sources, order, identity, rank=rank, world=world, workers=2)
    stream.restore(states)                   # optional: states of all processes
    samples = stream.next_unit()             # of one record, or of the records of a micro-batch
    stream.state()                           # position after the last unit, for JSON

The state holds a few integers for each source. With the same number of processes the samples after
`restore` are the same; with another number unread positions are distributed over the new ones: no
sample is lost or used twice. Shards stay dealt to as many nodes as when the run began, since a
position means a sample only in one deal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import KW_ONLY, astuple, dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from seed_multimodal.data.formats.bad_records import BadRecords, RecordNote
from seed_multimodal.data.formats.record import JsonObject, RecordFields
from seed_multimodal.data.stream.loader import load
from seed_multimodal.data.stream.order import (
    Chunks,
    Deal,
    EpochOrder,
    MixedOrder,
    Order,
    Span,
    share,
    unread,
)
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import changed_settings

Sample = TypeVar("Sample")
State = Mapping[str, Any]
Job = tuple[int, list[Span]]  # source and positions


class ReadResult(NamedTuple, Generic[Sample]):
    """The samples at a position, and a note if the record was skipped or changed."""

    samples: list[Sample]
    note: RecordNote | None = None


class Source(Protocol[Sample]):
    """Samples by position in an endless order.

    size: records of an epoch.
    rows: usable records of a unit.
    """

    name: str
    size: int
    rows: int

    def read(self, position: int) -> ReadResult[Sample]:
        """What stands at a position."""

    @property
    def shards(self) -> EpochOrder | MixedOrder:
        """The order whose shards are dealt to nodes."""

    def checksum(self) -> int:
        """Of the source's files."""


@dataclass
class SourceProgress:
    """What a process has used of a source.

    chunks: what it has yet to use.
    delivered: units.
    counts: records (`draws`), what was skipped, and of a language model sequences and tokens.
    """

    chunks: Chunks
    skipped: BadRecords
    delivered: int = 0

    def __post_init__(self) -> None:
        counts = {"sequences": 0, "tokens": 0, "draws": 0}
        self.counts: JsonObject = {**counts, "skipped": self.skipped.counts}

    def state(self) -> JsonObject:
        """For JSON."""
        return {
            "first": self.chunks.first,
            "count": self.chunks.count,
            "run": self.chunks.run,
            "left": self.chunks.left,
            "delivered": self.delivered,
            "broken": self.skipped.in_a_row,
            "counts": deepcopy(self.counts),
        }


@dataclass
class Stream(Generic[Sample]):
    """The samples of one process until all sources are exhausted.

    identity: what must not change when a run resumes.
    workers: processes that read (0: this one); the samples do not depend on their number.
    job_size: records that a worker reads at once.
    max_bad_in_a_row: consecutive broken records of a source that stop the run.
    log: receives a line for the first few records skipped for each reason.
    """

    sources: Sequence[Source[Sample]]
    order: Order
    identity: JsonObject
    _: KW_ONLY
    rank: int = 0
    world: int = 1
    workers: int = 0
    job_size: int
    max_bad_in_a_row: int
    log: Callable[[str], None] | None = None
    progress: list[SourceProgress] = field(default_factory=list)  # of each source
    _reader: _ReadAhead[Sample] | None = None  # None: workers are stopped

    def __post_init__(self) -> None:
        self.checksums = {source.name: source.checksum() for source in self.sources}
        self.deal([self.order.deal(index, self.world) for index in range(len(self.sources))])
        self.seek(0)

    def next_unit(self) -> list[Sample]:
        """The samples of the next unit; empty at the end of the data.

        Raises DataError: too many consecutive broken records, or a killed worker.
        """
        while True:
            delivered = [progress.delivered for progress in self.progress]
            available = [not progress.chunks.ended for progress in self.progress]
            number = sum(delivered) * self.world + self.rank
            source = self.order.choose(number, delivered, available)
            if source is None:
                return []
            samples = self._usable_records(source)
            if samples:
                self.progress[source].delivered += 1
                return samples

    def _usable_records(self, source: int) -> list[Sample]:
        """The samples of the next usable records of a source: one, or the rows of a micro-batch.

        Fewer at the source's end.
        """
        if self._reader is None:
            chunks = [progress.chunks for progress in self.progress]
            weights = self.order.weights
            self._reader = _ReadAhead(self.sources, chunks, weights, self.workers, self.job_size)
        progress = self.progress[source]
        samples: list[Sample] = []
        n_usable = 0
        while n_usable < self.sources[source].rows:
            result = self._reader.next(source)
            span = progress.chunks.take()
            if result is None or span is None:
                break
            if result.samples:
                n_usable += 1
                progress.skipped.in_a_row = 0
            # The run that drew the record first has counted it.
            if span.pieces is None:
                progress.counts["draws"] += 1
                if result.note is not None:
                    progress.skipped.add(result.note)
            samples += result.samples
        return samples

    def close(self) -> None:
        """Stop the workers; the next unit starts new ones."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    # ---- positions

    def deal(self, deals: Sequence[Deal | None]) -> None:
        """Deal the shards of each source to nodes."""
        for source, deal in zip(self.sources, deals, strict=True):
            source.shards.deal = deal

    def seek(self, position: int) -> None:
        """Go where all processes have used each source up to a position."""
        self.close()
        self.progress = []
        for index, source in enumerate(self.sources):
            chunks = self.order.chunks(index, self.rank, self.world, position)
            skipped = BadRecords(self.max_bad_in_a_row, self.log, f"source {source.name}: ")
            self.progress.append(SourceProgress(chunks, skipped))

    def state(self) -> JsonObject:
        """State for `restore` after the last unit, JSON-serializable; each process saves its
        own."""
        return {
            "rank": self.rank,
            "world": self.world,
            "data": self.identity,
            "checksums": self.checksums,
            "sources": [progress.state() for progress in self.progress],
            "deals": [
                source.shards.deal and astuple(source.shards.deal) for source in self.sources
            ],
        }

    def restore(self, states: Sequence[State]) -> None:
        """Resume from the saved states of all processes, whose number may differ.

        waiting: in a state, (source, position, index) of the samples of units that were not used.

        Raises ConfigError: missing states, or other data or settings.
        """
        states = sorted(states, key=lambda state: int(state["rank"]))
        self._check_states(states)
        # Those with which the run began; earlier versions, with other orders, saved none.
        deals = states[0].get("deals", [None] * len(self.sources))
        self.deal([_saved_deal(values) for values in deals])
        self.seek(0)
        for source, progress in enumerate(self.progress):
            # Each process's counts go to one of the new ones.
            for state in states[self.rank :: self.world]:
                merge_counts(progress.counts, state["sources"][source]["counts"])
            if len(states) == self.world:
                saved = states[self.rank]["sources"][source]
                progress.chunks = self._saved_chunks(states[self.rank], source)
                progress.delivered = saved["delivered"]
                progress.skipped.in_a_row = saved["broken"]
            else:
                self._redistribute(states, source)

    def _check_states(self, states: Sequence[State]) -> None:
        """Raise ConfigError: missing states, or other data or settings."""
        if len(states) != states[0]["world"]:
            raise ConfigError(
                f"The data state has {len(states)} ranks, but {states[0]['world']} were saved."
            )
        # Earlier versions saved no checksums, and no weights.
        saved = {
            "checksums": states[0].get("checksums", self.checksums),
            "weights": self.identity.get("weights"),
            **states[0]["data"],
        }
        changes = changed_settings(saved, {"checksums": self.checksums, **self.identity})
        if changes:
            raise ConfigError(
                "The data cannot be resumed: its settings, or contents of its files (checksums), "
                f"changed: {'; '.join(changes)}."
            )

    def _redistribute(self, states: Sequence[State], source: int) -> None:
        """Divide what another number of processes has not used of a source."""
        waiting: dict[int, list[int]] = {}  # indices of samples by position
        for state in states:
            for sample_source, position, index in state.get("waiting", ()):
                if sample_source == source:
                    waiting.setdefault(position, []).append(index)
        read = [Span(position, position + 1, indices) for position, indices in waiting.items()]
        first, spans = unread([self._saved_chunks(state, source) for state in states], read)
        progress = self.progress[source]
        progress.chunks = self.order.chunks(source, self.rank, self.world, first)
        progress.chunks.left = share(spans, self.rank, self.world)
        # Equal in all processes, whose units are numbered together.
        delivered = sum(state["sources"][source]["delivered"] for state in states)
        progress.delivered = (delivered - len(read)) // self.world

    def _saved_chunks(self, state: State, source: int) -> Chunks:
        """The positions of the process that saved a state."""
        saved = state["sources"][source]
        chunks = self.order.chunks(source, state["rank"], state["world"], saved["first"])
        chunks.count = saved["count"]
        chunks.run = saved.get("run", chunks.run)  # earlier versions saved none
        chunks.left = [Span(*span) for span in saved["left"]]
        return chunks


class _ReadAhead(Generic[Sample]):
    """The records of each source, in order, which workers read ahead of their use.

    The order in which sources are read ahead changes no result, only how long `next` waits.
    """

    def __init__(
        self,
        sources: Sequence[Source[Sample]],
        chunks: Sequence[Chunks],
        weights: Sequence[float],
        workers: int,
        job_size: int,
    ) -> None:
        self.unread = deepcopy(chunks)
        self.queues: list[deque[ReadResult[Sample]]] = [deque() for _ in chunks]
        self.n_ahead = [0] * len(chunks)  # records of each source that are read or being read
        # How many records of each source are used, relatively.
        pairs = zip(sources, weights, strict=True)
        self.needs = [source.rows * weight for source, weight in pairs]
        self.job_size = job_size
        self.results = load(partial(_read_job, sources), self._jobs(), workers)

    def next(self, source: int) -> ReadResult[Sample] | None:
        """The next record of a source; None: there is none."""
        queue = self.queues[source]
        while not queue:
            if not self.n_ahead[source] and self.unread[source].ended:
                return None
            job_source, results = next(self.results)
            self.queues[job_source] += results
        self.n_ahead[source] -= 1
        return queue.popleft()

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

    def _supply(self, source: int) -> float:
        """How long the records of a source last that are read ahead, with the next job."""
        return (self.n_ahead[source] + self.job_size) / self.needs[source]


def _saved_deal(values: Sequence[int] | None) -> Deal | None:
    """The deal of a state. Raises ConfigError: damaged."""
    if values is None:
        return None
    if len(values) != 4 or not all(type(value) is int and value > 0 for value in values):
        raise ConfigError(
            f"The data state is damaged: deal {values} must be four positive numbers; resume from "
            "another checkpoint."
        )
    return Deal(*values)


def _read_job(sources: Sequence[Source[Sample]], job: Job) -> tuple[int, list[ReadResult[Sample]]]:
    """A worker's job: the records at some positions of a source."""
    source, spans = job
    results = []
    for span in spans:
        for position in range(span.start, span.stop):
            samples, note = sources[source].read(position)
            if span.pieces is not None:
                samples = [samples[index] for index in span.pieces if index < len(samples)]
            results.append(ReadResult(samples, note))
    return source, results


def merge_counts(into: JsonObject, counts: RecordFields) -> None:
    """Add a source's counts from another process or run."""
    BadRecords(counts=into["skipped"]).merge(counts["skipped"])
    for key in into:
        if key != "skipped":
            into[key] += counts[key]
