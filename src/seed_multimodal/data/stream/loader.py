"""Results for consecutive steps, loaded ahead by worker processes: the one loader of all training data.

    loader = StepLoader(fetch, job, workers=4)
    loader.at(7); loader.at(8)         # consecutive steps are loaded ahead; a jump starts the workers anew

`job(step)` describes what to load for a step; `fetch(job)` loads it, in this process or in a worker. The workers are
those of torchdata's `StatefulDataLoader`; order and state are ours, because its own state does not survive a change of
the number of workers. A refusal (`SeedError`) inside a worker is raised here with its own sentence; a worker's death is
reported, too.
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

from seed_multimodal.errors import ConfigError, DataError, SeedError, first_line

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class StepLoader:
    """The result of `fetch` for a step, while the next steps are loaded; a context manager that stops the workers at
    its end.

    Workers ignore SIGTERM, so that a training process can finish its step. They end with `close`, with this object, or
    with the process that holds it, even one that is killed. torch's global generator is left alone.

    Args:
        fetch: job -> result; must be picklable where workers are spawned. Its optional method `enter_worker()` is
            called once in each worker.
        job: step -> job, called in this process. Must not hold this object: in a circle with it, workers would outlive
            it until the garbage is collected.
        workers: processes; 0 loads in this process when asked. On Linux they end with the thread that first asks `at`.
        worker_of: step -> number; steps of the same number (modulo `workers`) are loaded by the same worker, for
            `fetch`es that build on what they loaded before. Default: round robin.
        ahead: steps that each worker loads ahead.

    `wait_seconds` is the time spent inside `at` so far.
    """

    def __init__(self, fetch: Callable[[Any], Any], job: Callable[[int], Any], workers: int = 0,
                 worker_of: Callable[[int], int] | None = None, ahead: int = 2) -> None:
        if workers < 0:
            raise ConfigError(f"There cannot be {workers} data workers.")
        self.workers, self.ahead, self.wait_seconds = workers, ahead, 0.0
        self._fetch, self._job, self._worker_of = _Fetch(fetch), job, worker_of
        self._iterator: Any = None
        self._following = -1  # the step that the workers give next

    def at(self, step: int) -> Any:
        """The result for a step, from 0.

        Raises:
            SeedError: as `fetch` raises it, from workers too. DataError: a worker was killed.
        """
        if step < 0:
            raise ConfigError(f"There is no step {step}.")
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
            return next(result for result in self._iterator if not isinstance(result, _Filler))
        except (RuntimeError, OSError, EOFError) as error:
            ended = [worker for worker in getattr(self._iterator, "_workers", ()) if worker.exitcode is not None]
            sentence = _how_it_ended(ended[0]) if ended else ""  # before all are stopped
            starting = self._iterator is None and "DataLoader worker" in str(error)
            self.close()
            if starting:
                sentence = f"A data worker process ended while it was starting ({first_line(error)})."
            if not sentence:
                raise
            raise DataError(sentence) from error

    def _start(self, step: int) -> Any:
        from torchdata.stateful_dataloader import StatefulDataLoader  # of the extra `train`: missed when it is needed

        # A generator of its own: the loader would draw its workers' seed from the global one, and the training's random
        # numbers would depend on when workers were started. No snapshots: the state is ours.
        turns = _turns(self._job, step, self.workers, self._worker_of)
        others = set(multiprocessing.active_children())
        _WITH_WORKERS.add(self)
        with _no_sigchld_handler(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 with newer torch
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
            loader = StatefulDataLoader(self._fetch, batch_size=None, sampler=turns, num_workers=self.workers,
                                        collate_fn=_as_is, worker_init_fn=_enter, generator=torch.Generator(),
                                        prefetch_factor=self.ahead, snapshot_every_n_steps=None)
            try:
                return iter(loader)  # waits until each worker has answered
            except RuntimeError:
                for worker in set(multiprocessing.active_children()) - others:
                    worker.kill()  # they ignore SIGTERM, and the loader that holds them is lost
                raise


_WITH_WORKERS: weakref.WeakSet[StepLoader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Stop all workers at exit: after an exception the process would wait for ever for workers that ignore SIGTERM."""
    for loader in list(_WITH_WORKERS):
        loader.close()


class _Filler:
    """A job that loads nothing, for a worker whose turn is skipped."""


def _turns(job: Callable[[int], Any], start: int, workers: int, worker_of: Callable[[int], int] | None
           ) -> Iterator[Any]:
    """The jobs of the steps from `start` on, with fillers where the next job is another worker's."""
    places = itertools.count()
    for step in itertools.count(start):
        while worker_of is not None and worker_of(step) % workers != next(places) % workers:
            yield _Filler()
        yield job(step)


class _Fetch:
    """The data set that the workers see. A refusal is returned as a value: raised inside a worker it would arrive
    wrapped in a traceback."""

    def __init__(self, fetch: Callable[[Any], Any]) -> None:
        self.fetch = fetch

    def __getitem__(self, job: Any) -> Any:
        if isinstance(job, _Filler):
            return job
        try:
            return self.fetch(job)
        except SeedError as error:
            return error


def _as_is(value: Any) -> Any:
    return value


def _enter(worker: int) -> None:
    """Let a worker ignore the SIGTERM that torchrun sends to all: the training process ends it after its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_with_parent()
    info = get_worker_info()
    enter = getattr(info.dataset.fetch, "enter_worker", None) if info is not None else None
    if enter is not None:
        enter()


def _end_with_parent() -> None:
    """Linux ends this process as soon as the one it loads for is dead, by SIGKILL too.

    torch's workers check for this only between batches: one that waits to hand over a large batch would wait for ever.
    """
    if sys.platform != "linux":
        return
    parent = multiprocessing.parent_process()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if parent is not None and os.getppid() != parent.pid:  # it died before
        os._exit(1)


@contextmanager
def _no_sigchld_handler() -> Iterator[None]:
    """Undo the SIGCHLD handler that the start of workers installs: it would raise at any point of the training. A dead
    worker is reported where its batch is missing (the loader looks every 5 seconds)."""
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
