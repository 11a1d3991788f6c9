"""How the samples of a source are stored, for orders that keep reads local."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GROUP_CACHE_BYTES = 512 << 20  # bytes of row groups that a data worker caches for each source


@dataclass(frozen=True)
class StorageLayout:
    """Shards and row groups in the order of their samples.

    sizes        int64 [n]: number of samples of each
    group_bytes  int64 [n]: bytes of a row group, which is read whole; 0: a shard, read sample by sample
    """

    sizes: np.ndarray
    group_bytes: np.ndarray

    @staticmethod
    def of_shards(sizes: Sequence[int] | np.ndarray) -> StorageLayout:
        """Shards of these sizes."""
        counts = np.asarray(sizes, np.int64)
        return StorageLayout(counts, np.zeros_like(counts))

    @staticmethod
    def joined(layouts: Sequence[StorageLayout]) -> StorageLayout:
        """The layout of concatenated sources."""
        return StorageLayout(
            np.concatenate([layout.sizes for layout in layouts]),
            np.concatenate([layout.group_bytes for layout in layouts]),
        )

    @property
    def has_groups(self) -> bool:
        """Whether some of it is read in row groups."""
        return bool(self.group_bytes.any())
