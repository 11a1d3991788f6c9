"""Which positions of which source a process reads next.

    order = Order(weights, sizes, seed, cycles, blocks)
    chunks = order.chunks(source, rank, world)               # this process's positions
    source = order.choose(number, delivered, available)      # of its next unit
    chunks.take()

A source is drawn for each unit that is delivered (a packed sequence, a padded micro-batch or a
sample of an image's training), whatever records were left out in between. A process has every
`world`-th run of a source's positions, so that processes read different parts of the shards, and
none is read twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

ENDLESS = 2**40  # epochs
RUNS_PER_EPOCH = 4  # of each process, at least
_64_BITS = (1 << 64) - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15  # its fraction, in 64 bits


class Span(NamedTuple):
    """Neighbouring positions of a source."""

    start: int
    stop: int
    pieces: list[int] | None = None  # pieces of its single record to use; None: all

    @property
    def size(self) -> int:
        """Number of positions."""
        return self.stop - self.start


@dataclass
class Chunks:
    """A process's positions of one source: `left` by another number of processes, then runs of
    neighbours.

    Before the end of the data, where no full round of runs is left, each run is one position.

    first, limit: the regular positions of all processes.
    run: length of a run.
    count: regular positions of this process that were taken.
    """

    first: int
    limit: int
    run: int
    rank: int
    world: int
    count: int = 0
    left: list[Span] = field(default_factory=list)

    @cached_property
    def full(self) -> int:
        """Positions of a process in full rounds of runs."""
        return max(0, self.limit - self.first) // (self.world * self.run) * self.run

    def __iter__(self) -> Iterator[int]:
        """The remaining positions."""
        while (span := self.take()) is not None:
            yield span.start

    @property
    def ended(self) -> bool:
        """Whether all positions were taken."""
        return self.next_span() is None

    def next_span(self) -> Span | None:
        """The positions up to the end of the current run; None: all were taken."""
        if self.left:
            return self.left[0]
        if self.count < self.full:
            run, offset = divmod(self.count, self.run)
            start = (run * self.world + self.rank) * self.run + offset
            size = self.run - offset
        else:
            start = self.count * self.world + self.rank
            size = 1
        start += self.first
        return Span(start, start + size) if start < self.limit else None

    def take(self, most: int = 1) -> Span | None:
        """Pass up to `most` positions."""
        span = self.next_span()
        if span is None:
            return None
        start, stop, pieces = span
        taken = Span(start, min(stop, start + most), pieces)
        if not self.left:
            self.count += taken.stop - start
        elif taken.stop == stop:
            self.left = self.left[1:]
        else:
            self.left = [Span(taken.stop, stop), *self.left[1:]]
        return taken

    def take_all(self, count: int) -> list[Span]:
        """Pass `count` positions, or all that there are."""
        spans = []
        while count > 0 and (span := self.take(count)):
            spans.append(span)
            count -= span.size
        return spans


@dataclass(frozen=True)
class Order:
    """How the sources of a run alternate, and how processes share their positions.

    weights: share of each source in the units.
    sizes: records of an epoch.
    cycles: epochs; None: without end.
    blocks: neighbouring positions that are best read by one process.
    turns: sample: at random, by weight; even: by weight, with even distances; concat: source after
        source; mux_longest: in turn.
    run: neighbouring positions that a process takes; None: by `blocks`.
    """

    weights: Sequence[float]
    sizes: Sequence[int]
    seed: int
    cycles: Sequence[int | None]
    blocks: Sequence[int]
    turns: str = "sample"
    run: int | None = None

    def chunks(self, source: int, rank: int, world: int, first: int = 0) -> Chunks:
        """The positions of a process in a source, where all processes begin at `first`."""
        size = self.sizes[source]
        limit = size * (self.cycles[source] or ENDLESS)
        run = min(self.blocks[source], size // (RUNS_PER_EPOCH * world))
        return Chunks(first, limit, self.run or max(1, run), rank, world)

    def choose(
        self, number: int, delivered: Sequence[int], available: Sequence[bool]
    ) -> int | None:
        """The source of a unit; None: none is available.

        number: of the unit, among those of all processes.
        delivered: units of each source so far.
        """
        candidates = [source for source, is_available in enumerate(available) if is_available]
        if not candidates:
            return None
        if self.turns == "concat":
            return candidates[0]
        if self.turns == "mux_longest":
            return min(candidates, key=lambda source: delivered[source])  # the first of the rarest

        # Walk along the weights to a point: at random, or a multiple of the golden ratio. Of the
        # latter, any neighbours are spread evenly, whatever was drawn before.
        share = uniform(self.seed, number)
        if self.turns == "even":
            share = (number * GOLDEN_RATIO & _64_BITS) / (1 << 64)
        point = share * sum(self.weights[source] for source in candidates)
        for source in candidates:
            point -= self.weights[source]
            if point < 0:
                return source
        return candidates[-1]


def unread(before: Sequence[Chunks], waiting: Sequence[Span]) -> tuple[int, list[Span]]:
    """What all processes have not read of the rounds of runs that were begun in a source.

    waiting: records that were read, but not used.

    Returns the position after these rounds, and the unread positions before it, in order.
    """
    longest = max(before, key=lambda chunks: chunks.count)
    end = longest.count
    if end < longest.full:
        end = -(-end // longest.run) * longest.run
    spans = [*waiting]
    for chunks in before:
        n_left = sum(span.size for span in chunks.left)
        spans += chunks.take_all(n_left + end - chunks.count)
    spans.sort(key=lambda span: span.start)
    return longest.first + end * longest.world, spans


def share(spans: list[Span], rank: int, world: int) -> list[Span]:
    """A process's part of some positions."""
    total = sum(span.size for span in spans)
    begin = total * rank // world
    end = total * (rank + 1) // world
    chunks = Chunks(0, 0, 1, 0, 1, left=spans)
    chunks.take_all(begin)
    return chunks.take_all(end - begin)


def uniform(seed: int, index: int) -> float:
    """A float in [0, 1) determined by two integers (SplitMix64 mixing)."""
    state = seed & _64_BITS
    for value in (index, 0x5EED):
        state = ((state ^ value) + 0x9E3779B97F4A7C15) & _64_BITS
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _64_BITS
        state ^= state >> 31
    return (state >> 11) / (1 << 53)
