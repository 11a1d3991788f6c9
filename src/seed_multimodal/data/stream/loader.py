"""Results for consecutive steps, loaded ahead by worker processes: the part that all kinds of batches share.

    loader = StepLoader(fetch, jobs, workers=4)
    loader.at(7); loader.at(8)         # consecutive steps are loaded ahead; a jump starts the workers anew

`jobs(start)` yields what is to be loaded for step `start`, `start + 1`, ...; `fetch(job)` loads it, in this process or
a worker. Workers are torch's DataLoader's. A refusal inside one comes home as its sentence, a worker that is killed as
one too.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import multiprocessing.util  # noqa: F401  # before our atexit function, which must run before its own
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from seed_multimodal.errors import ConfigError, DataError, SeedError

Jobs = Callable[[int], Iterator[Any]]
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_FILLER = "filler"  # a place in the workers' turn that loads nothing


class StepLoader:
    """What `fetch` gives for a step, with the next steps under way.

    Args:
        fetch: job -> result; must survive pickling where workers are spawned. Its optional method `enter_worker()` is
            called once in each worker.
        jobs: see above. Must not hold this object: in a circle with it, workers would outlive it until the garbage is
            collected.
        workers: processes; 0 loads in this process when asked. On Linux they end with the thread that first asks `at`.
        worker_of: step -> number; steps of the same number (modulo `workers`) are loaded by the same worker, for
            `fetch`es that build on what they loaded before. Default: steps in turn.

    `wait_seconds` is the time spent inside `at` so far. torch's global generator is left alone.
    """

    def __init__(self, fetch: Callable[[Any], Any], jobs: Jobs, workers: int = 0,
                 worker_of: Callable[[int], int] | None = None) -> None:
        if workers < 0:
            raise ConfigError(f"There cannot be {workers} data workers.")
        self.workers, self.wait_seconds = workers, 0.0
        self._fetch, self._jobs, self._worker_of = _Fetch(fetch), jobs, worker_of
        self._iterator: Any = None
        self._local: Iterator[Any] | None = None
        self._next_step = -1

    def at(self, step: int) -> Any:
        """The result for a step, from 0.

        Raises:
            SeedError: what `fetch` says, as one sentence, from workers too. DataError: a worker was killed.
        """
        if step < 0:
            raise ConfigError(f"There is no step {step}.")
        started = time.perf_counter()
        if step != self._next_step:
            self.close()
        self._next_step = step + 1
        outcome = self._from_workers(step) if self.workers else self._here(step)
        self.wait_seconds += time.perf_counter() - started
        if isinstance(outcome, SeedError):
            self.close()
            raise outcome
        return outcome

    def close(self) -> None:
        """Stop the workers; the next `at` starts new ones."""
        iterator, self._iterator, self._local, self._next_step = self._iterator, None, None, -1
        if iterator is not None:  # not left to its end of life: a traceback may hold it
            iterator._shutdown_workers()

    def worker_pids(self) -> list[int]:
        """Process ids of the workers at work."""
        return [worker.pid for worker in getattr(self._iterator, "_workers", ())]

    def _here(self, step: int) -> Any:
        if self._local is None:
            self._local = self._jobs(step)
        return self._fetch[next(self._local)]

    def _from_workers(self, step: int) -> Any:
        if self._iterator is None:
            turn = _Turn(self._jobs, step, self.workers, self._worker_of)
            # A generator of its own: the loader would draw its workers' seed from the global one, and the training's
            # random numbers would depend on when workers were started.
            loader = DataLoader(self._fetch, batch_size=None, sampler=turn, num_workers=self.workers,
                                collate_fn=_as_is, worker_init_fn=_enter, generator=torch.Generator())
            with _quiet_deaths():
                self._iterator = iter(loader)
            _AT_WORK.add(self)
        outcome: Any = _FILLER
        while isinstance(outcome, str) and outcome == _FILLER:
            try:
                outcome = next(self._iterator)
            except (RuntimeError, OSError, EOFError) as error:
                ended = [worker for worker in self._iterator._workers if worker.exitcode is not None]
                sentence = _how_it_ended(ended[0]) if ended else ""  # before all are stopped
                self.close()
                if not ended:
                    raise
                raise DataError(sentence) from error
        return outcome


_AT_WORK: weakref.WeakSet[StepLoader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A process that ends by an exception still ends: it would wait for ever for workers that ignore SIGTERM."""
    for loader in list(_AT_WORK):
        loader.close()


class _Turn:
    """Sampler: the jobs from `start` on, with fillers where the next job is another worker's."""

    def __init__(self, jobs: Jobs, start: int, workers: int, worker_of: Callable[[int], int] | None) -> None:
        self.jobs, self.start, self.workers, self.worker_of = jobs, start, workers, worker_of

    def __iter__(self) -> Iterator[Any]:
        place = 0
        for step, job in zip(itertools.count(self.start), self.jobs(self.start)):  # noqa: B905  # both without end
            while self.worker_of is not None and self.worker_of(step) % self.workers != place % self.workers:
                yield _FILLER
                place += 1
            yield job
            place += 1


class _Fetch:
    """The data set that DataLoader sees. A refusal is given back as a value: raised inside a worker it would arrive
    wrapped in a traceback, not as its sentence."""

    def __init__(self, fetch: Callable[[Any], Any]) -> None:
        self.fetch = fetch

    def __getitem__(self, job: Any) -> Any:
        if isinstance(job, str) and job == _FILLER:
            return _FILLER
        try:
            return self.fetch(job)
        except SeedError as error:
            return error


def _as_is(value: Any) -> Any:
    return value


def _enter(worker: int) -> None:
    """A worker outlives the SIGTERM that torchrun sends to all: the training process ends it after its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_with_parent()
    info = get_worker_info()
    enter = getattr(info.dataset.fetch, "enter_worker", None) if info is not None else None
    if enter is not None:
        enter()


def _end_with_parent() -> None:
    """Linux ends this process as soon as the one it loads for is dead, by SIGKILL too.

    torch's workers look for it themselves, but only between batches: one that waits to hand over a large batch, which
    nobody reads any more, would wait for ever.
    """
    if sys.platform != "linux":
        return
    parent = multiprocessing.parent_process()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if parent is not None and os.getppid() != parent.pid:  # it died before
        os._exit(1)


@contextmanager
def _quiet_deaths() -> Iterator[None]:
    """Undo the SIGCHLD handler that DataLoader's start installs: it would raise wherever the training just is, while
    a dead worker is to be told where its batch is missing (DataLoader looks every 5 seconds)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None and signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)


def _how_it_ended(worker: Any) -> str:
    code = worker.exitcode
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    hint = " (signal 9 often means that memory ran out)" if code == -signal.SIGKILL else ""
    return (f"A data worker process (pid {worker.pid}) {how}{hint}; go on from the last checkpoint, with fewer workers "
            f"if it happens again.")
