"""Several data sets as one, and the batches of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from seed_multimodal.data.pair_dataset import PairDataset
from seed_multimodal.errors import ConfigError


class JoinedPairs:
    """Data sets one after the other; a sample of the whole is a sample of one of them.

    LAVIS concatenates the training sets of a run; so does this, for sets addressed by (index, epoch).
    """

    def __init__(self, parts: Sequence[PairDataset]) -> None:
        self.parts = list(parts)
        self.bad: list[tuple[str, str]] = []
        self._ends = np.cumsum([len(part) for part in self.parts])
        self._known: set[tuple[str, str]] = set()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def get(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """As `PairDataset.get`."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self.parts[number]
        before = len(part.bad)
        sample = part.get(index - (int(self._ends[number - 1]) if number else 0), epoch)
        for key, reason in part.bad[before:]:
            self._known.add((key, reason))
            self.bad.append((key, reason))
        return sample

    @property
    def shard_sizes(self) -> np.ndarray | None:
        """Samples per shard, if any set has shards (one without counts as one shard)."""
        sizes = [part.shard_sizes for part in self.parts]
        if all(size is None for size in sizes):
            return None
        return np.concatenate([np.array([len(part)]) if size is None else np.asarray(size)
                               for part, size in zip(self.parts, sizes, strict=True)])

    def note_bad(self, key: str, reason: str) -> None:
        """Count and log a bad sample that a data worker met, unless it is known."""
        if (key, reason) in self._known:
            return
        self._known.add((key, reason))
        self.bad.append((key, reason))
        if self.log is not None:
            self.log(f"skipped: {reason}")

    @property
    def log(self) -> Callable[[str], None] | None:
        """Who is told of bad samples; setting it sets it for every part."""
        return self.parts[0].log

    @log.setter
    def log(self, log: Callable[[str], None] | None) -> None:
        for part in self.parts:
            part.log = log


def split_of(datasets: Mapping[str, Mapping[str, PairDataset]], names: Sequence[str]) -> PairDataset | JoinedPairs:
    """The splits `names` of all data sets, joined.

    Raises:
        ConfigError: no data set has such a split.
    """
    found = [splits[name] for splits in datasets.values() for name in names if name in splits]
    if not found:
        wanted = " or ".join(map(repr, names)) or "(none named)"
        raise ConfigError(f"No data set of the configuration has a split {wanted}.")
    return found[0] if len(found) == 1 else JoinedPairs(found)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`; texts stay as they are."""
    return {key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()}
