"""Batches by step number, loaded ahead by the worker processes of torchdata's `StatefulDataLoader`.

    with StepBatches(dataset, 64, seed=0, rank=rank, world=world, workers=8) as batches:
        for step in range(start, steps):
            batch = batches.at(step)       # consecutive steps are loaded ahead; a jump restarts the workers

The same batch for (seed, step, rank), however the run was started. The caller keeps the position, because a loader's
own state does not survive another number of workers.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch.utils.data import default_collate

from seed_multimodal.data.stream.sampler import EpochOrder, MixedOrder, Part
from seed_multimodal.errors import DataError, SeedError, first_line

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class StepLoader:
    """`fetch(job(step))` by step: `job` is called here, `fetch` here or in `workers` processes; stop them by `close`.

    `wait_seconds` is the time spent inside `at` so far. torch's global generator is not used.
    """

    def __init__(self, fetch: Callable[[Any], Any], job: Callable[[int], Any], workers: int = 0) -> None:
        self.workers, self.wait_seconds = workers, 0.0
        self._fetch, self._job = _Fetch(fetch), job
        self._iterator: Any = None
        self._following = -1  # the step that the workers return next

    def at(self, step: int) -> Any:
        """The result for a step, from 0. Raises SeedError: as `fetch`, from workers too; DataError: one was killed."""
        started = time.perf_counter()
        result = self._from_workers(step) if self.workers else self._fetch[self._job(step)]
        self.wait_seconds += time.perf_counter() - started
        if isinstance(result, SeedError):
            self.close()
            raise result
        return result

    def close(self) -> None:
        """Stop the workers; the next `at` starts new ones."""
        iterator, self._iterator, self._following = self._iterator, None, -1
        if iterator is not None:  # not left to its end of life: a traceback may hold it
            iterator._shutdown_workers()
            atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _from_workers(self, step: int) -> Any:
        if step != self._following:
            self.close()
            self._iterator = self._start(step)
        self._following = step + 1
        try:
            return next(self._iterator)
        except RuntimeError as error:
            self.close()
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(f"{first_line(error).rstrip('.')} (often because memory ran out); resume from the last "
                            "checkpoint, with fewer workers if it happens again.") from error

    def _start(self, step: int) -> Any:
        from torchdata.stateful_dataloader import StatefulDataLoader  # of the extra `train`: missed when it is needed

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 with newer torch
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
            # Its own generator: else the training's random numbers would depend on when workers were started.
            iterator = iter(StatefulDataLoader(
                self._fetch, batch_size=None, sampler=map(self._job, itertools.count(step)), num_workers=self.workers,
                collate_fn=_as_is, worker_init_fn=_enter, generator=torch.Generator(), snapshot_every_n_steps=None))
        atexit.register(self.close)  # after an exception the process would wait for ever: workers ignore SIGTERM
        return iterator


class _Fetch:
    """The data set that the workers see. A `SeedError` is returned as a value: raised inside a worker it would arrive
    wrapped in a traceback."""

    def __init__(self, fetch: Callable[[Any], Any]) -> None:
        self.fetch = fetch

    def __getitem__(self, job: Any) -> Any:
        try:
            return self.fetch(job)
        except SeedError as error:
            return error


def _as_is(value: Any) -> Any:
    return value


def _enter(worker: int) -> None:
    """Let a worker ignore the SIGTERM that torchrun sends to all, and end as soon as its parent dies."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere torch's workers look for their parent between batches
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


class StepBatches(StepLoader):
    """Batches of one rank by step number; two ranks together have what one process with a double batch has.

    Args:
        dataset: `get(index, epoch)` gives a sample, `len` their number; optional: `shard_sizes`, `shuffle_block`, `bad`
            and `note_bad` as of `pairs_dataset.SourceDataset`.
        collate: samples -> batch, in the worker.
        order: instead of that of the set's epochs, shuffled in blocks where it has shards.
    """

    def __init__(self, dataset: Any, batch_size: int, *, seed: int, rank: int = 0, world: int = 1, workers: int = 0,
                 collate: Callable[[list[Any]], Any] = default_collate, shuffle: bool = True,
                 order: EpochOrder | MixedOrder | None = None) -> None:
        if not len(dataset):
            raise DataError("The training set is empty.")
        sizes = getattr(dataset, "shard_sizes", None)
        block = 0 if sizes is None else dataset.shuffle_block
        own = order or EpochOrder(len(dataset), seed, shuffle=shuffle, sizes=sizes, block=block)
        self.dataset = dataset
        super().__init__(_Batch(dataset, collate),
                         lambda step: own.parts((step * world + rank) * batch_size, batch_size), workers)

    def at(self, step: int) -> Any:
        """The batch of this rank at a (micro) step, from 0. Raises as `StepLoader.at`."""
        batch, bad = super().at(step)
        for key, reason in bad:
            self.dataset.note_bad(key, reason)
        return batch

    def bad_samples(self) -> list[tuple[str, str]]:
        """(key, reason) of each sample of this rank that had to be replaced so far."""
        return list(getattr(self.dataset, "bad", ()))


class _Batch:
    """One step's batch, and the samples found bad on the way."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __call__(self, parts: list[Part]) -> tuple[Any, list[tuple[str, str]]]:
        known = len(getattr(self.dataset, "bad", ()))
        batch = self.collate([self.dataset.get(int(index), epoch) for epoch, indices in parts for index in indices])
        return batch, list(getattr(self.dataset, "bad", ()))[known:]
