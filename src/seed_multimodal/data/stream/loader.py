"""Prefetching by worker processes of torchdata's `StatefulDataLoader`, and batches by step number.

    with StepBatches(dataset, 64, seed=0, rank=rank, world=world, workers=8) as batches:
        for step in range(start, steps):
            batch = batches.at(step)       # the next steps are prefetched; a jump restarts workers

A batch is determined by (seed, step, rank); the caller tracks the step.
"""

from __future__ import annotations

import atexit
import itertools
import signal
import time
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import default_collate

from seed_multimodal.data.formats.record import BadRecords, JsonObject, RecordFields, RecordNote
from seed_multimodal.data.stream.sampler import (
    EpochOrder,
    EpochSample,
    MixedOrder,
    distinct_samples,
)
from seed_multimodal.entry import kill_with_parent
from seed_multimodal.errors import DataError, SeedError

Job = TypeVar("Job")
Result = TypeVar("Result")
Sample = TypeVar("Sample")
Batch = TypeVar("Batch")
WORKER_KILLED = (
    "A data worker process was killed (often because memory ran out, in a container that of "
    "/dev/shm: docker run --shm-size=16g or --ipc=host); resume from the last checkpoint, with "
    "fewer workers if it happens again."
)


def load(
    fetch: Callable[[Job], Result], jobs: Iterable[Job], workers: int = 0
) -> Generator[Result, None, None]:
    """Results of `fetch` for each job, in order; `close` stops the workers.

    Raises SeedError: as `fetch`; DataError: a worker was killed.

    workers: processes; 0: this one.
    """
    if not workers:
        yield from map(fetch, jobs)
        return
    from torchdata.stateful_dataloader import StatefulDataLoader  # in the extra `train`

    # 1. Start the workers. They have a separate generator, so that training's random numbers do not
    #    change.
    with warnings.catch_warnings():
        # Of torchdata 0.11 with newer torch, and of more workers than cores.
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = StatefulDataLoader(
            _Fetch(fetch),
            batch_size=None,
            sampler=jobs,
            num_workers=workers,
            worker_init_fn=_init_worker,
            generator=torch.Generator(),
            snapshot_every_n_steps=None,
        )
        results = [iter(loader)]
    del loader

    # 2. Results, or the error of a worker. Without their iterator workers end, also at exit, where
    #    they ignore SIGTERM.
    atexit.register(results.clear)
    try:
        while (result := next(results[0], None)) is not None:
            if isinstance(result, SeedError):
                raise result
            yield ForkingPickler.loads(result)
    except (RuntimeError, OSError, EOFError) as error:
        if "in DataLoader worker process" in str(error):  # raised by `fetch`
            raise
        raise DataError(WORKER_KILLED) from error
    finally:
        results.clear()
        atexit.unregister(results.clear)


class _Fetch(Generic[Job, Result]):
    """The data set in the workers.

    Returns a `SeedError`, since raising would wrap it in a traceback.
    """

    def __init__(self, fetch: Callable[[Job], Result]) -> None:
        self.fetch = fetch

    def __getitem__(self, job: Job) -> bytes | SeedError:
        try:
            result = self.fetch(job)
        except SeedError as error:
            return error
        try:
            # Here, since the thread that sends results drops those that fail.
            return bytes(ForkingPickler.dumps(result))
        except (RuntimeError, OSError):  # no room in shared memory
            return DataError(WORKER_KILLED)


def _init_worker(worker: int) -> None:
    """Make a worker ignore torchrun's SIGTERM and Ctrl-C, and end when its parent dies."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kill_with_parent()  # elsewhere than on Linux torch's workers watch their parent themselves


class SampleDataset(Generic[Sample]):
    """Training samples by (index, epoch), for `StepBatches`; subclasses define `len` and `get`.

    log: receives a line for the first unusable samples of each kind.

    bad: samples that were replaced, of this process and its data workers.
    faults: those of the batch that is being read.
    """

    # Samples of each shard, int64 [shards]: the order keeps reads local. None: no shards.
    shard_sizes: np.ndarray | None = None

    def __init__(self, log: Callable[[str], None] | None = print) -> None:
        self.bad = BadRecords(log=log, label="skipped: ")
        self.faults: list[RecordNote] = []

    def __len__(self) -> int:
        raise NotImplementedError

    def get(self, index: int, epoch: int = 0) -> Sample:
        """One sample, or one in its place. Raises SeedError."""
        raise NotImplementedError

    def state_dict(self) -> JsonObject:
        """Counts of the bad samples so far, JSON-serializable."""
        return {"bad": self.bad.counts}

    def load_state_dict(self, state: RecordFields) -> None:
        """Add the bad samples of an earlier run, without logging them again."""
        self.bad.merge(state["bad"])


class StepBatches(AbstractContextManager["StepBatches[Batch]"], Generic[Batch]):
    """Batches of one rank by step number; together, ranks see the batch of a single process.

    collate: samples -> batch, in the worker.
    order: replaces the default epoch order.
    distinct: no sample twice in a step of all ranks, also at an epoch's end.
    """

    def __init__(
        self,
        dataset: SampleDataset[Sample],
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        collate: Callable[[list[Sample]], Batch] = default_collate,
        shuffle: bool = True,
        order: EpochOrder | MixedOrder | None = None,
        distinct: bool = False,
    ) -> None:
        if not len(dataset):
            raise DataError("The training set is empty.")
        self.order = order or EpochOrder(
            len(dataset), seed, shuffle=shuffle, shard_sizes=dataset.shard_sizes
        )
        self.dataset: SampleDataset[Any] = dataset
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.workers = workers
        self.distinct = distinct
        self.wait_seconds = 0.0  # time spent in `at`
        self._fetch = partial(_batch, dataset, collate)
        self._next_step = -1  # of the running workers
        self._loaded: Generator[tuple[Batch, list[RecordNote]], None, None] | None = None

    def at(self, step: int) -> Batch:
        """The batch of this rank at a (micro) step, from 0.

        Raises as `load`, and as `BadRecords.count_replaced`.
        """
        started = time.perf_counter()
        if self._loaded is None or step != self._next_step:
            self.close()
            jobs = map(self._samples, itertools.count(step))
            self._loaded = load(self._fetch, jobs, self.workers)
        self._next_step = -1  # after an error
        batch, faults = next(self._loaded)
        self._next_step = step + 1
        self.dataset.bad.count_replaced(faults, self.batch_size)
        self.wait_seconds += time.perf_counter() - started
        return batch

    def _samples(self, step: int) -> list[EpochSample]:
        rank_start = self.rank * self.batch_size
        start = step * self.world * self.batch_size
        if not self.distinct:
            return self.order.samples(start + rank_start, self.batch_size)
        samples = distinct_samples(self.order, start, self.world * self.batch_size)
        return samples[rank_start : rank_start + self.batch_size]

    def close(self) -> None:
        """Stop the workers; the next `at` starts new ones."""
        if self._loaded is not None:
            self._loaded.close()
        self._loaded = None

    def __exit__(self, *error: object) -> None:
        self.close()


def _batch(
    dataset: SampleDataset[Sample],
    collate: Callable[[list[Sample]], Batch],
    samples: list[EpochSample],
) -> tuple[Batch, list[RecordNote]]:
    """One step's batch, and the faults of samples that were replaced in it."""
    dataset.faults.clear()
    batch = collate([dataset.get(index, epoch) for epoch, index in samples])
    return batch, list(dataset.faults)
