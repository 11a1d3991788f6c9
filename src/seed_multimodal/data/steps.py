"""Batches addressed by step number: the same batch for (seed, step, rank), however the run was started or split.

    batches = StepBatches(dataset, 64, seed=0, rank=rank, world=world, workers=8)
    for step in range(start, steps):
        batch = batches.at(step)           # consecutive steps are prefetched; a jump starts the workers anew

Epoch e of the order is a seeded permutation of the set, and epochs follow each other without end. Rank r of step s
takes positions (s · world + r) · batch_size and on: two ranks together see what one process with a double batch sees.

Sets of shards are shuffled in blocks (default 10,000 samples, the shuffle buffer of the released loader): pieces of a
tenth of a block are permuted over all shards, then samples inside each block. Reads stay near each other on disk.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, get_worker_info

from seed_multimodal.errors import ConfigError, DataError, SeedError

SHUFFLE_BLOCK = 10_000
Part = tuple[int, np.ndarray]  # an epoch, and indices of samples int64 [n] to take of it


class StepDataset(Protocol):
    """What can be batched. Optional: `get_batch(indices, epoch) -> batch`, used instead of `get` and collating;
    `shard_sizes`, `bad` and `note_bad` as of `data.pair_dataset.PairDataset`."""

    def __len__(self) -> int: ...

    def get(self, index: int, epoch: int) -> Any:
        """One sample; random only by (index, epoch)."""


class EpochOrder:
    """An endless order of `range(total)`, epoch after epoch; a pure function of its arguments.

    Args:
        sizes: samples per shard, int64 [shards]; with them and `block` the shuffle is local, else over everything.
        block: samples that are shuffled among each other.
    """

    def __init__(self, total: int, seed: int, *, shuffle: bool = True, sizes: Sequence[int] | np.ndarray | None = None,
                 block: int = 0) -> None:
        self.total, self.seed, self.shuffle, self.block = total, seed, shuffle, block
        self.sizes = np.asarray([total] if sizes is None else sizes, np.int64)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def parts(self, start: int, count: int) -> list[Part]:
        """Positions `start` .. `start + count` of the order, cut where an epoch ends."""
        taken: list[Part] = []
        end = start + count
        while start < end:
            epoch, offset = divmod(start, self.total)
            taken.append((epoch, self._of(epoch)[offset:offset + end - start]))
            start += len(taken[-1][1])
        return taken

    def _of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        return self._order

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.total)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if not self.block:
            return torch.randperm(self.total, generator=generator).numpy()
        piece = max(1, self.block // 10)
        counts = -(-self.sizes // piece)
        shard = np.repeat(np.arange(len(self.sizes)), counts)
        within = (np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)) * piece
        mixed = torch.randperm(len(shard), generator=generator).numpy()
        shard, within = shard[mixed], within[mixed]
        firsts = (np.cumsum(self.sizes) - self.sizes)[shard] + within
        lengths = np.minimum(piece, self.sizes[shard] - within)
        order = np.arange(self.total) + np.repeat(firsts - (np.cumsum(lengths) - lengths), lengths)
        for start in range(0, self.total, self.block):
            run = order[start:start + self.block]
            order[start:start + self.block] = run[torch.randperm(len(run), generator=generator).numpy()]
        return order


class StepBatches:
    """Batches of one rank by step number.

    Args:
        dataset: see `StepDataset`.
        batch_size: samples of this rank in each (micro) step.
        workers: data processes; 0 loads in this process when asked. Batches are the same either way.
        collate: list of samples -> batch; default: torch's (tensors stacked, texts listed).
        block: samples shuffled among each other; None: 10,000 for sets with shards, everything for others; 0: all.

    `wait_seconds` is the time spent inside `at` so far. torch's global generator is left alone.

    Raises:
        ConfigError: settings that make no sense. DataError: an empty set.
    """

    def __init__(self, dataset: StepDataset, batch_size: int, *, seed: int, rank: int = 0, world: int = 1,
                 workers: int = 0, collate: Callable[[list[Any]], Any] | None = None, shuffle: bool = True,
                 block: int | None = None) -> None:
        if batch_size < 1 or workers < 0 or seed < 0 or not 0 <= rank < world or (block or 0) < 0:
            raise ConfigError(f"Batches of {batch_size}, rank {rank} of {world}, workers {workers}, seed {seed}, block "
                              f"{block}: batch_size must be positive, rank below world, and nothing negative.")
        if not len(dataset):
            raise DataError("The training set is empty.")
        sizes = getattr(dataset, "shard_sizes", None)
        if block is None:
            block = 0 if sizes is None else SHUFFLE_BLOCK
        self.dataset, self.batch_size, self.workers = dataset, batch_size, workers
        self.rank, self.world = rank, world
        self.order = EpochOrder(len(dataset), seed, shuffle=shuffle, sizes=sizes, block=block)
        self.wait_seconds = 0.0
        self._fetch = _Fetch(dataset, collate or default_collate)
        self._next_step = -1
        self._iterator: Iterator[Any] | None = None

    def at(self, step: int) -> Any:
        """The batch of this rank at a (micro) step, from 0.

        Raises:
            SeedError: what the dataset says about a sample, as one sentence, from workers too.
        """
        if step < 0:
            raise ConfigError(f"There is no step {step}.")
        started = time.perf_counter()
        outcome = self._prefetched(step) if self.workers else self._fetch[self.parts(step)]
        self.wait_seconds += time.perf_counter() - started
        if isinstance(outcome, SeedError):
            self.close()
            raise outcome
        batch, bad = outcome
        for key, reason in bad:
            self.dataset.note_bad(key, reason)  # type: ignore[attr-defined]  # only sets that have it report any
        return batch

    def parts(self, step: int) -> list[Part]:
        """(epoch, indices) of this rank's samples at a step; several where an epoch ends inside the batch."""
        return self.order.parts((step * self.world + self.rank) * self.batch_size, self.batch_size)

    def bad_samples(self) -> list[tuple[str, str]]:
        """(key, reason) of each sample of this rank that had to be replaced so far."""
        return list(getattr(self.dataset, "bad", ()))

    def close(self) -> None:
        """Stop the workers; the next `at` starts new ones."""
        self._iterator, self._next_step = None, -1

    def _prefetched(self, step: int) -> Any:
        if self._iterator is None or step != self._next_step:
            self.close()
            # A generator of its own: the loader would draw its workers' seed from the global one, and the training's
            # random numbers would depend on when workers were started.
            loader = DataLoader(self._fetch, batch_size=None, sampler=_Steps(self, step), num_workers=self.workers,
                                collate_fn=_as_is, worker_init_fn=_quiet, generator=torch.Generator())
            self._iterator = iter(loader)
        self._next_step = step + 1
        return next(self._iterator)


class _Steps:
    """Sampler: what each step from `start` on takes, without end.

    It does not hold the `StepBatches`: in a circle with it, workers would outlive it until the garbage is collected.
    """

    def __init__(self, batches: StepBatches, start: int) -> None:
        self.order, self.count = batches.order, batches.batch_size
        self.stride = batches.world * batches.batch_size
        self.first = start * self.stride + batches.rank * batches.batch_size

    def __iter__(self) -> Iterator[list[Part]]:
        return (self.order.parts(position, self.count) for position in itertools.count(self.first, self.stride))


class _Fetch:
    """Loads one step's batch, in this process or a worker.

    Gives (batch, samples found bad on the way), or the refusal itself: raised inside a worker it would arrive wrapped
    in a traceback, not as its sentence.
    """

    def __init__(self, dataset: StepDataset, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, parts: list[Part]) -> tuple[Any, list[tuple[str, str]]] | SeedError:
        bad: list[tuple[str, str]] = getattr(self.dataset, "bad", [])
        known = len(bad)
        get_batch = getattr(self.dataset, "get_batch", None)
        try:
            if get_batch is not None:
                batch = join_batches([get_batch(indices, epoch) for epoch, indices in parts])
            else:
                batch = self.collate([self.dataset.get(int(index), epoch) for epoch, indices in parts
                                      for index in indices])
        except SeedError as error:
            return error
        return batch, bad[known:]


def join_batches(batches: Sequence[Any]) -> Any:
    """Batches of the same make as one: tensors along their first axis, lists end to end, mappings by key."""
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(batches))
    if isinstance(first, Mapping):
        return {key: join_batches([batch[key] for batch in batches]) for key in first}
    if isinstance(first, list):
        return [item for batch in batches for item in batch]
    if isinstance(first, tuple):
        return tuple(join_batches(items) for items in zip(*batches, strict=True))
    raise TypeError(f"batches of {type(first).__name__} cannot be joined where an epoch ends")


def _as_is(value: Any) -> Any:
    return value


def _quiet(worker: int) -> None:
    """Bad samples are logged by the process that trains, once, not by each worker.

    A worker outlives the SIGTERM that torchrun sends to all: the training process ends it after finishing its step.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    info = get_worker_info()
    if info is not None and hasattr(info.dataset.dataset, "log"):
        info.dataset.dataset.log = None
