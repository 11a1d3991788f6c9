"""How the samples of a source are stored, for orders that keep reads local."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GROUP_CACHE_BYTES = 512 << 20  # of row groups that a data worker caches for each source


def find_part(ends: Sequence[int], index: int) -> tuple[int, int]:
    """The part with item `index`, and the item's index in it; `ends`: of the parts, in items."""
    part = bisect_right(ends, index)
    start = ends[part - 1] if part else 0
    return part, index - start


@dataclass(frozen=True)
class StorageLayout:
    """The shards of a source: its files, but of tables the row groups, in order."""

    sizes: np.ndarray  # int64 [shards]: number of samples of each
    # int64 [shards]: bytes of a row group, which is read whole; 0: a file, read sample by sample.
    group_bytes: np.ndarray

    @staticmethod
    def of_shards(sizes: Sequence[int] | np.ndarray) -> StorageLayout:
        """Shards of these sizes."""
        counts = np.asarray(sizes, np.int64)
        return StorageLayout(counts, np.zeros_like(counts))

    @staticmethod
    def joined(layouts: Sequence[StorageLayout]) -> StorageLayout:
        """The layout of concatenated sources."""
        sizes = np.concatenate([layout.sizes for layout in layouts])
        group_bytes = np.concatenate([layout.group_bytes for layout in layouts])
        return StorageLayout(sizes, group_bytes)

    @property
    def has_groups(self) -> bool:
        """Whether some of it is read in row groups."""
        return bool(self.group_bytes.any())
