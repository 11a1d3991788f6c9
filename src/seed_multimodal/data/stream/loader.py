"""Prefetching by worker processes of torchdata's `StatefulDataLoader`, and batches by step number.

    with StepBatches(dataset, 64, seed=0, rank=rank, world=world, workers=8) as batches:
        for step in range(start, steps):
            batch = batches.at(step)       # the next steps are prefetched; a jump restarts workers

A batch is determined by (seed, step, rank); the caller tracks the step.
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.queues import Queue
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch._C import _error_if_any_worker_fails
from torch.utils.data import default_collate

from seed_multimodal.data.formats.record import BadRecords, JsonObject, RecordFields
from seed_multimodal.data.stream.sampler import (
    EpochIndices,
    EpochOrder,
    MixedOrder,
    distinct_samples,
)
from seed_multimodal.entry import kill_with_parent
from seed_multimodal.errors import DataError, SeedError, first_line

Job = TypeVar("Job")
Result = TypeVar("Result")
Sample = TypeVar("Sample")
Batch = TypeVar("Batch")
Fault = tuple[str, str]  # name and message


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
    handler = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        # Of torchdata 0.11 with newer torch, and of more workers than cores.
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = StatefulDataLoader(
            _Fetch(fetch),
            batch_size=None,
            sampler=jobs,
            num_workers=workers,
            collate_fn=_identity,
            worker_init_fn=_init_worker,
            generator=torch.Generator(),
            snapshot_every_n_steps=None,
        )
        results = iter(loader)

    # 2. Restore the signal handler, since torch's would raise anywhere; stop workers at exit,
    #    because they ignore SIGTERM and exit would hang.
    if signal.getsignal(signal.SIGCHLD) is not handler:
        signal.signal(signal.SIGCHLD, handler)
    stop = results._shutdown_workers
    atexit.register(stop)

    # 3. Results, or the error of a worker.
    end: Any = object()
    try:
        while True:
            with failed_workers_raise():
                result = next(results, end)
            if result is end:
                return
            if isinstance(result, SeedError):
                raise result
            yield result
    except (RuntimeError, OSError, EOFError) as error:
        if "in DataLoader worker process" in str(error):  # raised by `fetch`
            raise
        raise DataError(
            "A data worker process was killed (often because memory ran out, in a container that "
            "of /dev/shm: docker run --shm-size=16g or --ipc=host); resume from the last "
            "checkpoint, with fewer workers if it happens again."
        ) from error
    finally:
        stop()
        atexit.unregister(stop)


@contextmanager
def failed_workers_raise() -> Iterator[None]:
    """Raise RuntimeError when a worker was killed: the rest of a half-written result never comes.

    In the main thread only, as all handlers of signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, lambda *_: _error_if_any_worker_fails())
    try:
        _error_if_any_worker_fails()  # one may have ended before this handler was set
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


class _Fetch(Generic[Job, Result]):
    """The data set in the workers.

    Returns a `SeedError`, since raising would wrap it in a traceback.
    """

    def __init__(self, fetch: Callable[[Job], Result]) -> None:
        self.fetch = fetch

    def __getitem__(self, job: Job) -> Result | SeedError:
        try:
            return self.fetch(job)
        except SeedError as error:
            return error


def _identity(value: Result) -> Result:
    return value


def _init_worker(worker: int) -> None:
    """Make a worker ignore torchrun's SIGTERM, and end when its parent dies or a result cannot be
    sent.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Python's own hook prints a traceback and drops the result, for which the parent would wait
    # forever.
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]
    kill_with_parent()  # elsewhere than on Linux torch's workers watch their parent themselves


def _end_worker(error: Exception, result: object) -> None:
    """End a worker whose result cannot be sent, usually because /dev/shm is full."""
    sys.stderr.write(f"data worker: {first_line(error)}\n")
    sys.stderr.flush()
    os._exit(1)


class SampleDataset(Generic[Sample]):
    """Training samples by (index, epoch), for `StepBatches`; subclasses define `len` and `get`.

    log: receives a line for the first unusable samples of each kind.

    bad: samples that were replaced, of this process and its data workers.
    faults: those of the batch that is being read, as (name, message).
    """

    # Samples of each shard, int64 [shards]: the order keeps reads local. None: no shards.
    shard_sizes: np.ndarray | None = None

    def __init__(self, log: Callable[[str], None] | None = print) -> None:
        self.bad = BadRecords(log=log, label="skipped: ")
        self.faults: list[Fault] = []

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


class StepBatches(Generic[Batch]):
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
        self._loaded: Generator[tuple[Batch, list[Fault]], None, None] | None = None

    def at(self, step: int) -> Batch:
        """The batch of this rank at a (micro) step, from 0. Raises as `load`."""
        started = time.perf_counter()
        if self._loaded is None or step != self._next_step:
            self.close()
            jobs = map(self._parts, itertools.count(step))
            self._loaded = load(self._fetch, jobs, self.workers)
        self._next_step = -1  # after an error
        batch, faults = next(self._loaded)
        self._next_step = step + 1
        for name, message in faults:
            self.dataset.bad.count(name, message)
        self.wait_seconds += time.perf_counter() - started
        return batch

    def _parts(self, step: int) -> list[EpochIndices]:
        rank_start = self.rank * self.batch_size
        start = step * self.world * self.batch_size
        if not self.distinct:
            return self.order.parts(start + rank_start, self.batch_size)
        samples = distinct_samples(self.order, start, self.world * self.batch_size)
        return [
            (epoch, np.array([index]))
            for epoch, index in samples[rank_start : rank_start + self.batch_size]
        ]

    def close(self) -> None:
        """Stop the workers; the next `at` starts new ones."""
        if self._loaded is not None:
            self._loaded.close()
        self._loaded = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _batch(
    dataset: SampleDataset[Sample],
    collate: Callable[[list[Sample]], Batch],
    parts: list[EpochIndices],
) -> tuple[Batch, list[Fault]]:
    """One step's batch, and the faults of samples that were replaced in it."""
    dataset.faults.clear()
    samples = [dataset.get(int(index), epoch) for epoch, indices in parts for index in indices]
    return collate(samples), list(dataset.faults)
