"""Which positions of which source a process reads next.

    order = Order(weights, sizes, seed, cycles, blocks)
    chunks = order.chunks(source, rank, world, first)        # this process's positions
    source = order.choose(number, delivered, available)      # of its next unit
    chunks.take()

A source is drawn for each unit that is delivered (a packed sequence, a padded micro-batch or a
sample of an image's training), whatever records were left out in between. A process has every
`world`-th run of a source's positions, so that processes read different parts of the shards, and
none is read twice.

    epochs = EpochOrder(len(samples), seed=0)
    epochs.samples(start=1000, count=64)                     # [(epoch, index), ...]

An epoch is a seeded permutation. Data in shards is shuffled in blocks to keep reads local: pieces
of all shards are permuted, then the samples inside each block.

piece    a tenth of a block, of neighbouring samples of one shard
block    `SHUFFLE_BLOCK` samples

With several nodes, the shards of an epoch are dealt to them (`Deal`): each node reads its part,
another one in each epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

ENDLESS = 2**40  # epochs
RUNS_PER_EPOCH = 4  # of each process, at least
SHUFFLE_BLOCK = 10_000
LARGE_EPOCH = 100_000  # samples; of larger epochs only two permutations are cached, else 16
CACHED_BLOCKS = 8
SHARES = 1_000_000  # resolution of the weights of `MixedOrder`
EpochSample = tuple[int, int]  # epoch and index of a sample
_64_BITS = (1 << 64) - 1


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
class Deal:
    """Which node reads a position: nodes take runs of neighbouring positions in turn.

    run: positions of a node's processes in a round.
    ranks: processes of a node; before the end of the data, a run is one position of each.
    limit: positions of all nodes.
    """

    run: int
    ranks: int
    nodes: int
    limit: int

    def before(self, position: int, node: int) -> int:
        """Positions of a node before this one."""
        in_runs = min(position, self._full)
        count = 0
        for passed, run in ((in_runs, self.run), (position - in_runs, self.ranks)):
            rounds, rest = divmod(passed, run * self.nodes)
            count += rounds * run + min(max(0, rest - node * run), run)
        return count

    def run_at(self, position: int) -> tuple[int, int]:
        """The node of a position, and the end of the run that holds it."""
        start, run = (0, self.run) if position < self._full else (self._full, self.ranks)
        number = (position - start) // run
        return number % self.nodes, start + (number + 1) * run

    @property
    def _full(self) -> int:
        """Positions in full rounds of runs."""
        size = self.run * self.nodes
        return self.limit // size * size


@dataclass
class Order:
    """How the sources of a run alternate, and how processes share their positions.

    weights: probability of each source.
    sizes: records of an epoch.
    cycles: epochs; None: without end.
    blocks: neighbouring positions that are best read by one process.
    turns: sample: by weight; concat: source after source; mux_longest: in turn.
    run: neighbouring positions that a process takes; None: by `blocks`.
    nodes: machines of equally many processes, to which shards are dealt.
    """

    weights: Sequence[float]
    sizes: Sequence[int]
    seed: int
    cycles: Sequence[int | None]
    blocks: Sequence[int]
    turns: str = "sample"
    run: int | None = None
    nodes: int = 1

    def chunks(self, source: int, rank: int, world: int, first: int) -> Chunks:
        """The positions of a process in a source, where all processes begin at `first`."""
        size = self.sizes[source]
        limit = size * (self.cycles[source] or ENDLESS)
        run = min(self.blocks[source], size // (RUNS_PER_EPOCH * world))
        return Chunks(first, limit, self.run or max(1, run), rank, world)

    def deal(self, source: int, world: int) -> Deal | None:
        """How a source is dealt to nodes; None: there is one, or they differ in size."""
        if self.nodes == 1 or world % self.nodes:
            return None
        chunks = self.chunks(source, 0, world, 0)
        ranks = world // self.nodes
        return Deal(chunks.run * ranks, ranks, self.nodes, chunks.limit)

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

        # Weighted sampling: walk along the weights to a random point.
        total = sum(self.weights[source] for source in candidates)
        point = uniform(self.seed, number) * total
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


# ---- samples at positions


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """A 63-bit hash of the arguments."""
    (state,) = np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)
    return int(state >> np.uint64(1))


@dataclass
class EpochOrder:
    """An endless order of `range(total)`, epoch by epoch.

    shard_sizes: samples of each shard, int64 [shards]; given, samples are shuffled in blocks.
    block: largest number of samples of a block; 0: samples of all shards among each other.
    """

    total: int
    seed: int
    _: KW_ONLY
    shuffle: bool = True
    shard_sizes: np.ndarray | None = None
    block: int = SHUFFLE_BLOCK
    deal: Deal | None = None
    # By epoch and node, of one node -1.
    _cache: dict[tuple[int, int], np.ndarray | _BlockPermutation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.shuffle or self.shard_sizes is None:  # neighbours are not read together
            self.block = 0

    def samples(self, start: int, count: int) -> list[EpochSample]:
        """Positions `start` .. `start + count` of the order."""
        samples: list[EpochSample] = []
        end = start + count
        while start < end:
            # 1. Positions in one epoch, and of one node.
            epoch, offset = divmod(start, self.total)
            stop = min(end, (epoch + 1) * self.total)
            node = -1
            if self.deal and self.block:
                node, run_end = self.deal.run_at(start)
                stop = min(stop, run_end)
                offset = self.deal.before(start, node) - self.deal.before(start - offset, node)

            # 2. Their samples.
            places = slice(offset, offset + stop - start)
            indices: Iterable[int] = range(places.start, places.stop)
            if self.shuffle:
                indices = self._permutation(epoch, node)[places].tolist()
            samples += [(epoch, index) for index in indices]
            start = stop
        return samples

    def _permutation(self, epoch: int, node: int = -1) -> np.ndarray | _BlockPermutation:
        """The order of an epoch, or of a node's part of it; near its end, several epochs are in
        use."""
        key = (epoch, node)
        if key in self._cache:
            return self._cache[key]

        # Drop the oldest epochs.
        n_cached = 2 if self.total > LARGE_EPOCH else 16
        while len(self._cache) >= n_cached * (self.deal.nodes if self.deal else 1):
            del self._cache[next(iter(self._cache))]

        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
        order: np.ndarray | _BlockPermutation
        if self.block and self.shard_sizes is not None:
            sizes = self.shard_sizes
            starts = np.cumsum(sizes) - sizes
            if node >= 0:
                shard_order = torch.randperm(len(sizes), generator=generator).numpy()
                begin, end = self._part(epoch, node)
                starts, sizes = _cut(starts[shard_order], sizes[shard_order], begin, end)
            order = _BlockPermutation(starts, sizes, self.block, generator)
        else:
            dtype = torch.int32 if self.total < 1 << 31 else torch.int64  # 4 bytes are enough
            order = torch.randperm(self.total, generator=generator, dtype=dtype).numpy()
        self._cache[key] = order
        return order

    def _part(self, epoch: int, node: int) -> tuple[int, int]:
        """Begin and end of a node's part of an epoch: as many samples as it has positions there."""
        assert self.deal is not None
        begin = end = 0
        for other in range(node + 1):
            begin = end
            first, last = (
                self.deal.before(number * self.total, other) for number in (epoch, epoch + 1)
            )
            end += last - first
        return begin, end


class _BlockPermutation:
    """Shards, or parts of them, shuffled in blocks, computed on access: a full array would take GBs
    in each data worker.

    P pieces are permuted over all shards; the permuted pieces, one after another, are divided into
    blocks.

    ends: end of each permuted piece, int64 [P].
    shifts: what to add to a position in the permuted pieces to get its sample, by piece, int64 [P].
    """

    def __init__(
        self, starts: np.ndarray, sizes: np.ndarray, block: int, generator: torch.Generator
    ) -> None:
        """starts, sizes: first sample and samples of each shard, int64 [shards]."""
        self.block = block
        self.total = int(sizes.sum())

        # 1. Permute the pieces.
        firsts, lengths = _pieces(starts, sizes, max(1, block // 10))
        piece_order = torch.randperm(len(lengths), generator=generator).numpy()
        lengths = lengths[piece_order]
        self.ends = np.cumsum(lengths)
        self.shifts = firsts[piece_order] - (self.ends - lengths)

        # 2. Blocks are permuted when they are read. One generator permutes them in sequence, so its
        #    state after the pieces and the next block are stored.
        self._cache: dict[int, np.ndarray] = {}  # last used blocks
        self._generator = generator
        self._start = generator.get_state()
        self._next = 0

    def __getitem__(self, positions: slice) -> np.ndarray:
        """Samples at these positions, int64."""
        first = positions.start // self.block
        last = (positions.stop - 1) // self.block
        samples = []
        for block in range(first, last + 1):
            start = block * self.block
            offset = max(0, positions.start - start)
            samples.append(self._block(block)[offset : positions.stop - start])
        return np.concatenate(samples)

    def _block(self, block: int) -> np.ndarray:
        """The samples of a block, in order."""
        if block in self._cache:
            return self._cache[block]

        # 1. Permute the blocks up to this one; an earlier one starts again.
        if block < self._next:
            self._generator.set_state(self._start)
            self._next = 0
        for skipped in range(self._next, block + 1):
            size = min(self.block, self.total - skipped * self.block)
            permutation = torch.randperm(size, generator=self._generator)
        self._next = block + 1

        # 2. Positions in the permuted pieces → samples.
        positions = block * self.block + np.arange(len(permutation))  # [size]
        piece = np.searchsorted(self.ends, positions, side="right")  # [size]
        samples = positions + self.shifts[piece]

        # 3. Drop the oldest blocks.
        while len(self._cache) >= CACHED_BLOCKS:
            del self._cache[next(iter(self._cache))]
        self._cache[block] = samples[permutation.numpy()]
        return self._cache[block]


def _cut(
    starts: np.ndarray, sizes: np.ndarray, begin: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Samples `begin` .. `end` of shards one after another, as shards: their starts and sizes."""
    shard_ends = np.cumsum(sizes)
    shard_begins = shard_ends - sizes
    begins = np.maximum(shard_begins, begin)
    parts = np.minimum(shard_ends, end) - begins
    used = parts > 0
    return (starts + begins - shard_begins)[used], parts[used]


def _pieces(
    starts: np.ndarray, sizes: np.ndarray, piece_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """First sample and length of each piece, int64 [P]: the shards, cut."""
    counts = -(-sizes // piece_size)  # pieces of each shard
    shard = np.repeat(np.arange(len(counts)), counts)  # of each piece, [P]
    first_piece = np.repeat(np.cumsum(counts) - counts, counts)  # of the piece's shard, [P]
    offset = (np.arange(len(shard)) - first_piece) * piece_size  # in the shard, [P]
    return starts[shard] + offset, np.minimum(piece_size, sizes[shard] - offset)


def even_block(total: int) -> int:
    """Size of blocks that divide an epoch evenly, at most `SHUFFLE_BLOCK`."""
    return math.ceil(total / math.ceil(total / SHUFFLE_BLOCK))


class MixedOrder:
    """An endless order over concatenated sets, each in its own endless order.

    Any n consecutive positions of a node contain n · weight_i ± 2 of set i.

    totals: size of each set.
    shard_sizes: of each set, see `EpochOrder`.
    """

    def __init__(
        self,
        totals: Sequence[int],
        weights: Sequence[float],
        seed: int,
        *,
        shard_sizes: Sequence[np.ndarray | None] | None = None,
    ) -> None:
        self._deal: Deal | None = None
        shares = np.rint(np.asarray(weights, float) / sum(weights) * SHARES)
        shares = np.maximum(1, shares).astype(np.int64)
        self._cumulative_shares = np.cumsum(shares)
        self._set_starts = np.cumsum([0, *totals[:-1]])
        self._orders = []
        for index, total in enumerate(totals):
            set_seed = int(np.random.SeedSequence((seed, index)).generate_state(1)[0])
            sizes = None if shard_sizes is None else shard_sizes[index]
            self._orders.append(EpochOrder(total, set_seed, shard_sizes=sizes))

    def sample_counts(self, positions: np.ndarray) -> np.ndarray:
        """Samples of each set in the first p positions: int64 `[n]` → int64 `[sets, n]`."""
        # The first k sets have a rounded share of the count of the first k + 1, so counts never
        # decrease.
        counts = []
        remaining = positions  # samples of the sets up to `index`
        for index in range(len(self._cumulative_shares) - 1, 0, -1):
            share = self._cumulative_shares[index - 1]
            total = self._cumulative_shares[index]
            before = (2 * remaining * share + total) // (2 * total)
            counts.append(remaining - before)
            remaining = before
        return np.stack([remaining, *counts[::-1]])

    @property
    def deal(self) -> Deal | None:
        """Of the positions to nodes, each of which mixes the sets by itself."""
        return self._deal

    @deal.setter
    def deal(self, deal: Deal | None) -> None:
        self._deal = deal
        for order in self._orders:  # a node has each `nodes`-th position of a set
            order.deal = deal and Deal(1, 1, deal.nodes, order.total * ENDLESS)

    def samples(self, start: int, count: int) -> list[EpochSample]:
        """Positions `start` .. `start + count` of the order."""
        if self._deal is None:
            return self._mixed(start, count)
        samples: list[EpochSample] = []
        for position in range(start, start + count):
            node, _ = self._deal.run_at(position)
            samples += self._mixed(self._deal.before(position, node), 1, node, self._deal.nodes)
        return samples

    def _mixed(self, start: int, count: int, node: int = 0, nodes: int = 1) -> list[EpochSample]:
        """Positions of a node's own mixture."""
        # 1. Set of each position: the one whose count grows there.
        totals = self.sample_counts(np.arange(start, start + count + 1, dtype=np.int64))
        chosen = np.diff(totals).argmax(axis=0)  # [count]

        # 2. The samples of each set, taken in turn.
        sets = [
            iter(order.samples(first * nodes + node, end - first))
            for order, (first, end) in zip(self._orders, totals[:, [0, -1]].tolist(), strict=True)
        ]
        samples = []
        for set_index in chosen.tolist():
            epoch, index = next(sets[set_index])
            samples.append((epoch, index + int(self._set_starts[set_index])))
        return samples


@dataclass
class DistinctOrder:
    """An order in which no step holds a sample twice.

    A second one, behind an epoch's end, is replaced by the next of the order.

    size: positions of a step of all processes; there must be as many different samples.
    """

    order: EpochOrder | MixedOrder
    size: int
    _last: tuple[int, list[EpochSample]] = (-1, [])  # a step by its first position

    def samples(self, start: int, count: int) -> list[EpochSample]:
        """Positions `start` .. `start + count` of the order."""
        samples: list[EpochSample] = []
        first = start - start % self.size
        # A step inside an epoch holds each sample once; of other nodes none is computed.
        last = start + count - 1 + self.size
        if (
            isinstance(self.order, EpochOrder)
            and last // self.order.total == first // self.order.total
        ):
            return self.order.samples(start, count)
        for step_start in range(first, start + count, self.size):
            samples += self._step(step_start)
        return samples[start - first : start - first + count]

    def _step(self, start: int) -> list[EpochSample]:
        """The different samples of a step."""
        if self._last[0] != start:
            epochs: dict[int, int] = {}  # by sample
            position = start
            while len(epochs) < self.size:
                missing = self.size - len(epochs)
                for epoch, index in self.order.samples(position, missing):
                    epochs.setdefault(index, epoch)
                position += missing
            self._last = (start, [(epoch, index) for index, epoch in epochs.items()])
        return self._last[1]
