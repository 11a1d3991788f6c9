"""Results for consecutive steps, loaded ahead by the worker processes of torchdata's `StatefulDataLoader`.

    loader = StepLoader(fetch, job, workers=4)
    loader.at(7); loader.at(8)         # consecutive steps are loaded ahead; a jump restarts the workers

`job(step)` describes what to load for a step; `fetch(job)` loads it, in this process or in a worker. The position is
kept by the caller, because a loader's own state does not survive another number of workers.
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
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.data import get_worker_info

from seed_multimodal.errors import DataError, SeedError

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class StepLoader:
    """The result of `fetch` for a step, while the next steps are loaded; a context manager that stops its workers.

    Workers ignore SIGTERM, so that a training process can finish its step, and end with the process that holds them,
    even one that is killed. torch's global generator is not used.

    Args:
        fetch: job -> result. Its optional method `enter_worker()` is called once in each worker.
        job: step -> job, called in this process, in the order of steps. Must not hold this object.
        workers: processes; 0 loads in this process when asked.
        ahead: steps that each worker loads ahead.

    `wait_seconds` is the time spent inside `at` so far.
    """

    def __init__(self, fetch: Callable[[Any], Any], job: Callable[[int], Any], workers: int = 0, ahead: int = 2
                 ) -> None:
        self.workers, self.ahead, self.wait_seconds = workers, ahead, 0.0
        self._fetch, self._job = _Fetch(fetch), job
        self._iterator: Any = None
        self._following = -1  # the step that the workers return next

    def at(self, step: int) -> Any:
        """The result for a step, from 0.

        Raises:
            SeedError: as `fetch` raises it, from workers too. DataError: a worker was killed.
        """
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

    def worker_pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [worker.pid for worker in getattr(self._iterator, "_workers", ())]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _from_workers(self, step: int) -> Any:
        if step != self._following:
            self.close()
        self._following = step + 1
        try:
            if self._iterator is None:
                self._iterator = self._start(step)
            return next(self._iterator)
        except (RuntimeError, OSError, EOFError) as error:
            ended = [worker for worker in getattr(self._iterator, "_workers", ()) if worker.exitcode is not None]
            sentence = _how_it_ended(ended[0]) if ended else ""  # before all are stopped
            self.close()
            if not sentence:
                raise
            raise DataError(sentence) from error

    def _start(self, step: int) -> Any:
        from torchdata.stateful_dataloader import StatefulDataLoader  # of the extra `train`: missed when it is needed

        # Its own generator: else the training's random numbers would depend on when workers were started.
        _WITH_WORKERS.add(self)
        with _no_sigchld_handler(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 with newer torch
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
            return iter(StatefulDataLoader(
                self._fetch, batch_size=None, sampler=map(self._job, itertools.count(step)), num_workers=self.workers,
                collate_fn=_as_is, worker_init_fn=_enter, generator=torch.Generator(), prefetch_factor=self.ahead,
                snapshot_every_n_steps=None))


_WITH_WORKERS: weakref.WeakSet[StepLoader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Stop all workers at exit: after an exception the process would wait for ever for workers that ignore SIGTERM."""
    for loader in list(_WITH_WORKERS):
        loader.close()


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
    """Let a worker ignore the SIGTERM that torchrun sends to all, and end when its parent dies."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_with_parent()
    info = get_worker_info()
    enter = getattr(info.dataset.fetch, "enter_worker", None) if info is not None else None
    if enter is not None:
        enter()


def _end_with_parent() -> None:
    """Linux ends this process as soon as its parent is dead; torch's workers check for this only between batches."""
    if sys.platform != "linux":
        return
    parent = multiprocessing.parent_process()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if parent is not None and os.getppid() != parent.pid:  # it died before
        os._exit(1)


@contextmanager
def _no_sigchld_handler() -> Iterator[None]:
    """Undo the SIGCHLD handler that the start of workers installs: it would raise at any point of the training."""
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
    return (f"A data worker process (pid {worker.pid}) {how}{hint}; resume from the last checkpoint, with fewer "
            f"workers if it happens again.")
