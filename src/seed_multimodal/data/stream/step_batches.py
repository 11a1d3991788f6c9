"""Batches addressed by step number: the same batch for (seed, step, rank), however the run was started or split.

    with StepBatches(dataset, 64, seed=0, rank=rank, world=world, workers=8) as batches:
        for step in range(start, steps):
            batch = batches.at(step)       # consecutive steps are prefetched; a jump restarts the workers

Rank r of step s has positions (s · world + r) · batch_size and on of the order (`stream.order`): two ranks together
have what one process with a double batch has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import default_collate

from seed_multimodal.data.stream.loader import StepLoader
from seed_multimodal.data.stream.order import SHUFFLE_BLOCK, EpochOrder, Order, Part
from seed_multimodal.errors import DataError


class StepDataset(Protocol):
    """What can be batched. Optional: `get_batch(indices, epoch) -> batch`, used instead of `get` and collating;
    `shard_sizes`, `bad` and `note_bad` as of `pair_dataset.PairDataset`."""

    def __len__(self) -> int: ...

    def get(self, index: int, epoch: int) -> Any:
        """One sample; random only by (index, epoch)."""


class StepBatches(StepLoader):
    """Batches of one rank by step number.

    Args:
        batch_size: samples of this rank in each (micro) step.
        collate: list of samples -> batch; default: torch's (tensors stacked, texts listed).
        block: samples shuffled among each other; None: by `block_of` for sets with shards, for others everything.
        order: another order than that of epochs (then `shuffle` and `block` do nothing).

    Raises:
        DataError: an empty set.
    """

    def __init__(self, dataset: StepDataset, batch_size: int, *, seed: int, rank: int = 0, world: int = 1,
                 workers: int = 0, collate: Callable[[list[Any]], Any] | None = None, shuffle: bool = True,
                 block: int | None = None, order: Order | None = None) -> None:
        if not len(dataset):
            raise DataError("The training set is empty.")
        sizes = getattr(dataset, "shard_sizes", None)
        if block is None:
            block = 0 if sizes is None else block_of(dataset)
        self.dataset = dataset
        self.order = order or EpochOrder(len(dataset), seed, shuffle=shuffle, sizes=sizes, block=block)
        self.parts: Callable[[int], list[Part]] = partial(_share, self.order, batch_size, rank, world)
        super().__init__(_Fetch(dataset, collate or default_collate), self.parts, workers)

    def at(self, step: int) -> Any:
        """The batch of this rank at a (micro) step, from 0.

        Raises:
            SeedError: as the dataset raises it, from workers too.
        """
        batch, bad = super().at(step)
        for key, reason in bad:
            self.dataset.note_bad(key, reason)  # type: ignore[attr-defined]  # only sets that have it report any
        return batch

    def bad_samples(self) -> list[tuple[str, str]]:
        """(key, reason) of each sample of this rank that had to be replaced so far."""
        return list(getattr(self.dataset, "bad", ()))


def block_of(dataset: Any) -> int:
    """Samples of a set with shards that are shuffled among each other."""
    return max(10, min(SHUFFLE_BLOCK, getattr(dataset, "shuffle_block", None) or SHUFFLE_BLOCK))


def _share(order: Order, batch_size: int, rank: int, world: int, step: int) -> list[Part]:
    """The samples of one rank at a step: (epoch, indices), several where an epoch ends inside the batch."""
    return order.parts((step * world + rank) * batch_size, batch_size)


class _Fetch:
    """Loads one step's batch, in this process or a worker: (batch, samples found bad on the way)."""

    def __init__(self, dataset: StepDataset, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def enter_worker(self) -> None:
        """Bad samples are logged by the process that trains, once, not by each worker."""
        if hasattr(self.dataset, "log"):
            self.dataset.log = None

    def __call__(self, parts: list[Part]) -> tuple[Any, list[tuple[str, str]]]:
        bad: list[tuple[str, str]] = getattr(self.dataset, "bad", [])
        known = len(bad)
        get_batch = getattr(self.dataset, "get_batch", None)
        if get_batch is not None:
            batch = _join([get_batch(indices, epoch) for epoch, indices in parts])
        else:
            batch = self.collate([self.dataset.get(int(index), epoch) for epoch, indices in parts
                                  for index in indices])
        return batch, bad[known:]


def _join(batches: Sequence[Any]) -> Any:
    """Batches of the same structure as one: tensors along their first axis, mappings by key, lists end to end."""
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(batches))
    if isinstance(first, Mapping):
        return {key: _join([batch[key] for batch in batches]) for key in first}
    return [item for batch in batches for item in batch]
