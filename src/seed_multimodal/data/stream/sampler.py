"""Sample order: a pure function of (seed, position).

    EpochOrder(len(dataset), seed=0).parts(start=1000, count=64)       # [(epoch, indices), ...]
    MixedOrder([len(a), len(b)], [3.0, 1.0], seed=0)                   # several sets by weights

An epoch is a seeded permutation. Sharded data is shuffled in blocks to keep disk reads local: pieces of a tenth of a
block are permuted over all shards, then samples inside each block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

SHUFFLE_BLOCK = 10_000
SHARES = 1_000_000  # resolution of weights
_KEPT = 8  # cached permuted blocks
Sizes = Sequence[int] | np.ndarray | None
Part = tuple[int, np.ndarray]  # epoch and sample indices int64 [n]


class EpochOrder:
    """An endless order of `range(total)`, epoch by epoch. With shards (`sizes`), `block` samples are shuffled among
    each other (0: all)."""

    def __init__(self, total: int, seed: int, *, shuffle: bool = True, sizes: Sizes = None, block: int = 0) -> None:
        self.total, self.seed, self.shuffle = total, seed, shuffle
        self.block = 0 if sizes is None else block
        self.sizes = np.asarray(() if sizes is None else sizes, np.int64)
        self._kept: dict[int, np.ndarray | _Blocks] = {}

    def parts(self, start: int, count: int) -> list[Part]:
        """Positions `start` .. `start + count` of the order, split at epoch ends."""
        taken: list[Part] = []
        end = start + count
        while start < end:
            epoch, offset = divmod(start, self.total)
            stop = min(offset + end - start, self.total)
            taken.append((epoch, self._epoch(epoch)[offset:stop].astype(np.int64) if self.shuffle
                          else np.arange(offset, stop)))
            start += stop - offset
        return taken

    def _epoch(self, epoch: int) -> np.ndarray | _Blocks:
        """The order of an epoch; near its end, several epochs are in use."""
        if epoch not in self._kept:
            while len(self._kept) >= (2 if self.total > 100_000 else 16):
                del self._kept[next(iter(self._kept))]
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
            dtype = torch.int32 if self.total < 1 << 31 else torch.int64  # 4 bytes per sample if enough
            self._kept[epoch] = _Blocks(self.sizes, self.block, generator) if self.block else torch.randperm(
                self.total, generator=generator, dtype=dtype).numpy()
        return self._kept[epoch]


class _Blocks:
    """An epoch shuffled in blocks, computed on access: a full array would take GBs in each data worker."""

    def __init__(self, sizes: np.ndarray, block: int, generator: torch.Generator) -> None:
        self.block, self.total, self._generator = block, int(sizes.sum()), generator
        piece = max(1, block // 10)
        counts = -(-sizes // piece)
        shard = np.repeat(np.arange(len(sizes)), counts)
        within = (np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)) * piece
        mixed = torch.randperm(len(shard), generator=generator).numpy()
        shard, within = shard[mixed], within[mixed]
        firsts = (np.cumsum(sizes) - sizes)[shard] + within
        lengths = np.minimum(piece, sizes[shard] - within)
        self.ends = np.cumsum(lengths)
        self.moved = firsts - (self.ends - lengths)  # offset from a position in the permuted pieces to its sample
        self._kept: dict[int, np.ndarray] = {}  # last used blocks
        self._start, self._next = generator.get_state(), 0  # next block to permute

    def __getitem__(self, places: slice) -> np.ndarray:
        """Samples at these positions, int64."""
        return np.concatenate([
            self._block(number)[max(0, places.start - number * self.block):places.stop - number * self.block]
            for number in range(places.start // self.block, -(-places.stop // self.block))])

    def _block(self, number: int) -> np.ndarray:
        if number not in self._kept:
            if number < self._next:
                self._generator.set_state(self._start)
                self._next = 0
            for block in range(self._next, number + 1):  # one generator permutes the blocks in sequence
                drawn = torch.randperm(min(self.block, self.total - block * self.block), generator=self._generator)
            self._next = number + 1
            places = number * self.block + np.arange(len(drawn))
            places += self.moved[np.searchsorted(self.ends, places, side="right")]
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[number] = places[drawn.numpy()]
        return self._kept[number]


class MixedOrder:
    """An endless order over concatenated sets, each in its own endless order: any n consecutive positions contain
    n · weight_i ± 2 of set i. `sizes`, `block`: per set, see `EpochOrder`."""

    def __init__(self, totals: Sequence[int], weights: Sequence[float], seed: int, *,
                 sizes: Sequence[Sizes] | None = None, block: int = 0) -> None:
        shares = np.maximum(1, np.rint(np.asarray(weights, float) / sum(weights) * SHARES)).astype(np.int64)
        self._upto = np.cumsum(shares)
        self._firsts = np.cumsum([0, *totals[:-1]])
        self._orders = [
            EpochOrder(total, int(np.random.SeedSequence((seed, number)).generate_state(1)[0]), sizes=size, block=block)
            for number, (total, size) in enumerate(zip(totals, sizes or [None] * len(totals), strict=True))]

    def draw_counts(self, positions: np.ndarray) -> np.ndarray:
        """Number of samples of each set in the first p positions: int64 `[n]` → int64 `[sets, n]`."""
        # The first k sets have a rounded share of the count of the first k + 1, so counts never decrease.
        counts, rest = [], positions
        for number in range(len(self._upto) - 1, 0, -1):
            part, whole = self._upto[number - 1], self._upto[number]
            before = (2 * rest * part + whole) // (2 * whole)
            counts.append(rest - before)
            rest = before
        return np.stack([rest, *counts[::-1]])

    def parts(self, start: int, count: int) -> list[Part]:
        """Positions `start` .. `start + count`, split where set or epoch changes."""
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
