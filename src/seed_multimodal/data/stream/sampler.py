"""Sample order: a pure function of (seed, position).

    EpochOrder(len(dataset), seed=0).parts(start=1000, count=64)       # [(epoch, indices), ...]
    MixedOrder([len(a), len(b)], [3.0, 1.0], seed=0)                   # several sets by weights

An epoch is a seeded permutation. Sharded data is shuffled in blocks to keep reads local: pieces are permuted over all
shards, then samples inside each block of pieces. A piece is a tenth of a block of one shard, or a whole row group; a
block has `SHUFFLE_BLOCK` samples, or as many row groups as fit into the cache of a data worker (at least one).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from seed_multimodal.data.formats.layout import GROUP_CACHE_BYTES, StorageLayout

SHUFFLE_BLOCK = 10_000
# Bytes of a block's row groups: two blocks fit into the cache, and decoded groups are larger than stored ones.
BLOCK_BYTES = GROUP_CACHE_BYTES // 2
SHARES = 1_000_000  # resolution of weights
_KEPT = 8  # cached permuted blocks
Part = tuple[int, np.ndarray]  # epoch and sample indices int64 [n]


class EpochOrder:
    """An endless order of `range(total)`, epoch by epoch. With a `layout`, it is shuffled in blocks of at most `block`
    samples (0: samples of all shards among each other)."""

    def __init__(
        self,
        total: int,
        seed: int,
        *,
        shuffle: bool = True,
        layout: StorageLayout | None = None,
        block: int = SHUFFLE_BLOCK,
    ) -> None:
        self.total, self.seed, self.shuffle = total, seed, shuffle
        self.layout, self.block = layout, block if shuffle and layout is not None else 0
        self._kept: dict[int, np.ndarray | _Blocks] = {}

    @property
    def block_size(self) -> int:
        """Mean number of samples of a block; 0: not shuffled in blocks."""
        if not self.block or self.layout is None:
            return 0
        return math.ceil(self.total / _count_blocks(self.layout, self.block))

    def parts(self, start: int, count: int) -> list[Part]:
        """Positions `start` .. `start + count` of the order, split at epoch ends."""
        taken: list[Part] = []
        end = start + count
        while start < end:
            epoch, offset = divmod(start, self.total)
            stop = min(offset + end - start, self.total)
            taken.append(
                (
                    epoch,
                    self._epoch(epoch)[offset:stop].astype(np.int64)
                    if self.shuffle
                    else np.arange(offset, stop),
                )
            )
            start += stop - offset
        return taken

    def _epoch(self, epoch: int) -> np.ndarray | _Blocks:
        """The order of an epoch; near its end, several epochs are in use."""
        if epoch not in self._kept:
            while len(self._kept) >= (2 if self.total > 100_000 else 16):
                del self._kept[next(iter(self._kept))]
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
            if self.block and self.layout is not None:
                self._kept[epoch] = _Blocks(self.layout, self.block, generator)
            else:
                dtype = (
                    torch.int32 if self.total < 1 << 31 else torch.int64
                )  # 4 bytes per sample if enough
                self._kept[epoch] = torch.randperm(
                    self.total, generator=generator, dtype=dtype
                ).numpy()
        return self._kept[epoch]


class _Blocks:
    """An epoch shuffled in blocks, computed on access: a full array would take GBs in each data worker."""

    def __init__(self, layout: StorageLayout, block: int, generator: torch.Generator) -> None:
        self._generator = generator
        pieces = _Pieces(layout, block)
        mixed = torch.randperm(len(pieces.lengths), generator=generator).numpy()
        lengths = pieces.lengths[mixed]
        ends = np.cumsum(lengths)
        self.ends = ends
        self.moved = pieces.firsts[mixed] - (
            ends - lengths
        )  # from a position in the permuted pieces to its sample
        if layout.has_groups:
            self.bounds = _whole_pieces(lengths, pieces.bytes[mixed], block)
        else:
            total = int(layout.sizes.sum())
            self.bounds = np.append(np.arange(0, total, block), total)
        self._kept: dict[int, np.ndarray] = {}  # last used blocks
        self._start, self._next = generator.get_state(), 0  # next block to permute

    def __getitem__(self, positions: slice) -> np.ndarray:
        """Samples at these positions, int64."""
        first = int(np.searchsorted(self.bounds, positions.start, side="right")) - 1
        last = int(np.searchsorted(self.bounds, positions.stop - 1, side="right")) - 1
        samples = []
        for number in range(first, last + 1):
            start = int(self.bounds[number])
            samples.append(
                self._block(number)[max(0, positions.start - start) : positions.stop - start]
            )
        return np.concatenate(samples)

    def _block(self, number: int) -> np.ndarray:
        """The samples of a block, in order."""
        if number not in self._kept:
            if number < self._next:
                self._generator.set_state(self._start)
                self._next = 0
            for block in range(
                self._next, number + 1
            ):  # one generator permutes the blocks in sequence
                size = int(self.bounds[block + 1] - self.bounds[block])
                drawn = torch.randperm(size, generator=self._generator)
            self._next = number + 1
            positions = int(self.bounds[number]) + np.arange(len(drawn))
            positions += self.moved[np.searchsorted(self.ends, positions, side="right")]
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[number] = positions[drawn.numpy()]
        return self._kept[number]


class _Pieces:
    """Neighbouring samples that stay in one block: `firsts`, `lengths` and `bytes` (of row groups), int64 [n]."""

    def __init__(self, layout: StorageLayout, block: int) -> None:
        piece = max(1, block // 10)
        is_group = layout.group_bytes > 0
        counts = np.where(is_group, layout.sizes > 0, -(-layout.sizes // piece))
        shard = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(shard)) - np.repeat(
            np.cumsum(counts) - counts, counts
        )  # in its shard
        within = number * piece
        starts = np.cumsum(layout.sizes) - layout.sizes
        self.firsts = starts[shard] + within
        self.lengths = np.where(
            is_group[shard], layout.sizes[shard], np.minimum(piece, layout.sizes[shard] - within)
        )
        self.bytes = layout.group_bytes[shard]


def _whole_pieces(lengths: np.ndarray, sizes: np.ndarray, block: int) -> np.ndarray:
    """Bounds of blocks of whole pieces, int64 [blocks + 1]: at most `block` samples and `BLOCK_BYTES` each, or one
    piece."""
    sample_ends, byte_ends = np.append(0, np.cumsum(lengths)), np.append(0, np.cumsum(sizes))
    pieces = [0]  # first piece of each block
    while pieces[-1] < len(lengths):
        first = pieces[-1]
        by_samples = np.searchsorted(sample_ends, sample_ends[first] + block, side="right") - 1
        by_bytes = np.searchsorted(byte_ends, byte_ends[first] + BLOCK_BYTES, side="right") - 1
        pieces.append(max(first + 1, int(min(by_samples, by_bytes))))
    return sample_ends[pieces].astype(np.int64)


def _count_blocks(layout: StorageLayout, block: int) -> int:
    """Number of blocks of an epoch (with row groups about)."""
    if not layout.has_groups:
        return math.ceil(int(layout.sizes.sum()) / block)
    pieces = _Pieces(layout, block)
    return len(_whole_pieces(pieces.lengths, pieces.bytes, block)) - 1


def even_block(total: int) -> int:
    """Size of blocks that divide an epoch evenly, at most `SHUFFLE_BLOCK`."""
    return math.ceil(total / math.ceil(total / SHUFFLE_BLOCK))


class MixedOrder:
    """An endless order over concatenated sets, each in its own endless order: any n consecutive positions contain
    n · weight_i ± 2 of set i. `layouts`: of each set, see `EpochOrder`."""

    def __init__(
        self,
        totals: Sequence[int],
        weights: Sequence[float],
        seed: int,
        *,
        layouts: Sequence[StorageLayout | None] | None = None,
    ) -> None:
        shares = np.maximum(1, np.rint(np.asarray(weights, float) / sum(weights) * SHARES)).astype(
            np.int64
        )
        self._upto = np.cumsum(shares)
        self._firsts = np.cumsum([0, *totals[:-1]])
        self._orders = [
            EpochOrder(
                total,
                int(np.random.SeedSequence((seed, number)).generate_state(1)[0]),
                layout=layout,
            )
            for number, (total, layout) in enumerate(
                zip(totals, layouts or [None] * len(totals), strict=True)
            )
        ]

    def sample_counts(self, positions: np.ndarray) -> np.ndarray:
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
        drawn = self.sample_counts(np.arange(start, start + count + 1, dtype=np.int64))
        chosen = np.diff(drawn).argmax(axis=0)
        epochs, indices = np.empty(count, np.int64), np.empty(count, np.int64)
        for number, order in enumerate(self._orders):
            places = np.flatnonzero(chosen == number)
            if len(places):
                taken = order.parts(int(drawn[number, 0]), len(places))
                epochs[places] = np.concatenate(
                    [np.full(len(some), epoch) for epoch, some in taken]
                )
                indices[places] = np.concatenate([some for _, some in taken]) + self._firsts[number]
        cuts = np.flatnonzero((np.diff(chosen) != 0) | (np.diff(epochs) != 0)) + 1
        return [(int(epochs[run[0]]), indices[run]) for run in np.split(np.arange(count), cuts)]
