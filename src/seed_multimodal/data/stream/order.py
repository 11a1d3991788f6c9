"""In which order samples are read: a pure function of (seed, position).

    order = EpochOrder(len(dataset), seed=0)                           # one set, epoch after epoch
    order = MixedOrder([len(a), len(b)], [3.0, 1.0], seed=0)           # several sets by weights
    order.parts(start=1000, count=64)                                  # [(epoch, indices), ...]

Epoch e of a set is a seeded permutation of it. Sets of shards are shuffled in blocks (default 10,000 samples, the
shuffle buffer of the original loader): pieces of a tenth of a block are permuted over all shards, then samples inside
each block, so reads stay near each other on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from seed_multimodal.errors import ConfigError

SHUFFLE_BLOCK = 10_000
SHARES = 1_000_000  # resolution of the weights
_KEPT = 8  # permuted blocks in memory
Sizes = Sequence[int] | np.ndarray | None
Part = tuple[int, np.ndarray]  # an epoch, and indices of samples int64 [n] to take of it


class Order(Protocol):
    """An order of samples."""

    def parts(self, start: int, count: int) -> list[Part]:
        """Positions `start` .. `start + count`, in runs of one epoch each; a pure function."""


class EpochOrder:
    """An endless order of `range(total)`, epoch after epoch.

    Args:
        sizes: samples per shard, int64 [shards]; with them and `block` the shuffle is local, else over everything.
        block: samples that are shuffled among each other.
        keep: epochs whose order stays in memory, for readers that are in several at once.
    """

    def __init__(self, total: int, seed: int, *, shuffle: bool = True, sizes: Sizes = None, block: int = 0,
                 keep: int = 1) -> None:
        self.total, self.seed, self.shuffle, self.block, self.keep = total, seed, shuffle, block, keep
        self.sizes = np.asarray([total] if sizes is None else sizes, np.int64)
        self._kept: dict[int, Callable[[int, int], np.ndarray]] = {}  # the one used last at the end

    def parts(self, start: int, count: int) -> list[Part]:
        """Positions `start` .. `start + count` of the order, cut where an epoch ends."""
        taken: list[Part] = []
        end = start + count
        while start < end:
            epoch, offset = divmod(start, self.total)
            stop = min(offset + end - start, self.total)
            taken.append((epoch, self._of(epoch)(offset, stop)))
            start += stop - offset
        return taken

    def _of(self, epoch: int) -> Callable[[int, int], np.ndarray]:
        """The order of an epoch, from one position to another."""
        if not self.shuffle:
            return np.arange
        order = self._kept.pop(epoch, None)
        if order is None:
            while len(self._kept) >= self.keep:
                del self._kept[next(iter(self._kept))]
            seed = (self.seed * 1_000_003 + epoch) % (1 << 63)
            order = _Blocks(self.sizes, self.block, seed) if self.block else _Whole(self.total, seed)
        self._kept[epoch] = order
        return order


class _Whole:
    """A permutation of all samples, 4 bytes each (8 from 2³¹ samples on)."""

    def __init__(self, total: int, seed: int) -> None:
        dtype = torch.int32 if total < 1 << 31 else torch.int64
        self.order = torch.randperm(total, generator=torch.Generator().manual_seed(seed), dtype=dtype).numpy()

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Positions `start` .. `stop`, int64."""
        return self.order[start:stop].astype(np.int64)


class _Blocks:
    """An epoch that is shuffled in blocks, computed when they are read: the order of 100 million samples would take
    0.8 GB in every data worker. One generator permutes the blocks one after the other."""

    def __init__(self, sizes: np.ndarray, block: int, seed: int) -> None:
        self.block, self.total = block, int(sizes.sum())
        piece = max(1, block // 10)
        counts = -(-sizes // piece)
        shard = np.repeat(np.arange(len(sizes)), counts)
        within = (np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)) * piece
        self._generator = torch.Generator().manual_seed(seed)
        mixed = torch.randperm(len(shard), generator=self._generator).numpy()
        shard, within = shard[mixed], within[mixed]
        firsts = (np.cumsum(sizes) - sizes)[shard] + within
        lengths = np.minimum(piece, sizes[shard] - within)
        self.ends = np.cumsum(lengths)
        self.moved = firsts - (self.ends - lengths)  # from a position in the mixed pieces to its sample
        self._blocks: dict[int, np.ndarray] = {}  # the last ones read
        self._start, self._next = self._generator.get_state(), 0  # the block that the generator permutes next

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Positions `start` .. `stop`, int64."""
        parts = [self._block(number)[max(0, start - number * self.block):stop - number * self.block]
                 for number in range(start // self.block, -(-stop // self.block))]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])

    def _block(self, number: int) -> np.ndarray:
        found = self._blocks.get(number)
        if found is None:
            places = np.arange(number * self.block, min((number + 1) * self.block, self.total))
            places += self.moved[np.searchsorted(self.ends, places, side="right")]
            found = places[self._permutation(number)]
            while len(self._blocks) >= _KEPT:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[number] = found
        return found

    def _permutation(self, number: int) -> np.ndarray:
        """What the generator gives for a block, after all blocks before it."""
        if number < self._next:
            self._generator.set_state(self._start)
            self._next = 0
        for block in range(self._next, number + 1):
            drawn = torch.randperm(min(self.block, self.total - block * self.block), generator=self._generator)
        self._next = number + 1
        return drawn.numpy()


class ChosenOrder:
    """Certain samples once, in the order given: int64 `[n]`. Positions beyond them are none."""

    def __init__(self, indices: np.ndarray) -> None:
        self.indices = indices

    def parts(self, start: int, count: int) -> list[Part]:
        """As `Order`."""
        return [(0, self.indices[start:start + count])]


def drawn_indices(order: Order, draws: int, total: int) -> np.ndarray:
    """Which of `total` samples the first `draws` positions of an order hold: int64, ascending."""
    drawn = np.zeros(total, bool)
    for start in range(0, draws, 100_000):
        for _, indices in order.parts(start, min(100_000, draws - start)):
            drawn[indices] = True
        if drawn.all():
            break
    return np.flatnonzero(drawn)


class MixedOrder:
    """An endless order over sets that lie one after the other.

    Positions are shared out by rounding: among any n positions in a row set i has n · weight_i of them, give or take
    two, so every batch of every rank holds its share. Each set goes through its own endless order.

    Args:
        totals: samples of each set, none 0.
        weights: how often each is drawn from; only their ratios count.
        sizes: for each set the samples of its shards, or None; block: see `EpochOrder` (for sets with shards).
    """

    def __init__(self, totals: Sequence[int], weights: Sequence[float], seed: int, *,
                 sizes: Sequence[Sizes] | None = None, block: int = 0) -> None:
        if not min(weights) > 0:
            raise ConfigError(f"Sets need positive weights, not {list(weights)}.")
        shares = np.maximum(1, np.rint(np.asarray(weights, float) / sum(weights) * SHARES)).astype(np.int64)
        self._upto = np.cumsum(shares)
        self._firsts = np.cumsum([0, *totals[:-1]])
        shards = sizes or [None] * len(totals)
        self._orders = [
            EpochOrder(total, int(np.random.SeedSequence((seed, number)).generate_state(1)[0]), sizes=size,
                       block=0 if size is None else block)
            for number, (total, size) in enumerate(zip(totals, shards, strict=True))]

    def draw_counts(self, positions: np.ndarray) -> np.ndarray:
        """How many of the first p positions each set has: int64 `[n]` → int64 `[sets, n]`.

        The first k sets together have a rounded share of what the first k + 1 have, so no count ever falls.
        """
        counts, rest = [], positions
        for number in range(len(self._upto) - 1, 0, -1):
            part, whole = self._upto[number - 1], self._upto[number]
            before = (2 * rest * part + whole) // (2 * whole)
            counts.append(rest - before)
            rest = before
        return np.stack([rest, *counts[::-1]])

    def parts(self, start: int, count: int) -> list[Part]:
        """Positions `start` .. `start + count`, cut where the set or its epoch changes."""
        drawn = self.draw_counts(np.arange(start, start + count + 1, dtype=np.int64))
        chosen = np.diff(drawn).argmax(axis=0)
        epochs, indices = np.empty(count, np.int64), np.empty(count, np.int64)
        for number, order in enumerate(self._orders):
            places = np.flatnonzero(chosen == number)
            if len(places):
                taken = order.parts(int(drawn[number, 0]), len(places))
                epochs[places] = np.concatenate([np.full(len(some), epoch) for epoch, some in taken])
                indices[places] = np.concatenate([some for _, some in taken]) + self._firsts[number]
        cuts = np.flatnonzero((np.diff(chosen) != 0) | (np.diff(epochs) != 0)) + 1
        return [(int(epochs[run[0]]), indices[run]) for run in np.split(np.arange(count), cuts)]
