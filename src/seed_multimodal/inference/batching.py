"""Batches of several threads' work (encoding and drawing of images), and a cache of results."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from seed_multimodal.device import is_out_of_memory
from seed_multimodal.inference.prompt import Stopped

POLL_SECONDS = 0.2  # between two looks at `should_stop` while waiting

Key = TypeVar("Key")
Row = TypeVar("Row")
Result = TypeVar("Result")


@dataclass(eq=False)
class Job(Generic[Key, Row, Result]):
    """One thread's work.

    key: settings that must be equal in a batch.
    results: one for each row.
    """

    key: Key
    rows: Sequence[Row]
    results: list[Result] | None = None
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.results is not None or self.error is not None


class DynamicBatcher(Generic[Key, Row, Result]):
    """`batcher(key, rows)` returns `work(key, rows)`, a list with a result for each row.

    One thread at a time works: on its rows, and on those that other threads have queued meanwhile.
    Only the main thread computes itself. Others leave that to one thread, because matrix libraries
    keep buffers and workers for each thread that has computed: 250 MB in nano's server.

    max_rows: of a joint batch; halved for the rest of the run on out-of-memory.
    wait: seconds to wait for as many threads as recently; a single thread does not wait.
    """

    def __init__(
        self,
        work: Callable[[Key, Sequence[Row]], Sequence[Result]],
        max_rows: int = 8,
        wait: float = 0.02,
    ) -> None:
        self.work = work
        self.max_rows = max_rows
        self.wait = wait
        self._waiting: list[Job[Key, Row, Result]] = []
        self._busy = False
        self._expected = 1  # threads that are likely to bring work soon
        self._changed = threading.Condition()
        self._worker = ThreadPoolExecutor(1, "seed-images")

    def __call__(
        self, key: Key, rows: Sequence[Row], should_stop: Callable[[], bool] | None = None
    ) -> list[Result]:
        """The results of `work`; raises what it raises for these rows alone.

        should_stop: asked before work on the rows begins; true raises `Stopped`.
        """
        if not rows:
            return []
        # Whichever thread gets its turn works for the others, too.
        job: Job[Key, Row, Result] = Job(key, rows)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()
        while not job.done:
            batch = self._wait_for_turn(job, should_stop)
            if batch:
                self._run(batch)
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
        if job.error is not None:
            raise job.error
        return job.results or []

    def _wait_for_turn(
        self, job: Job[Key, Row, Result], should_stop: Callable[[], bool] | None
    ) -> list[Job[Key, Row, Result]]:
        """The batch that this thread has to compute: none if another one works, or did `job`."""
        with self._changed:
            self._changed.wait_for(lambda: job.done or not self._busy, POLL_SECONDS)
            if should_stop and job in self._waiting and should_stop():
                self._waiting.remove(job)
                raise Stopped
            if self._busy or job not in self._waiting:
                return []
            self._busy = True
            return self._next_batch()

    def _next_batch(self) -> list[Job[Key, Row, Result]]:
        """The oldest waiting jobs with the same key."""
        # 1. Wait for the threads that brought work recently, until they have or do not come.
        if self._expected > 1:
            self._changed.wait_for(lambda: len(self._waiting) >= self._expected, self.wait)
        self._expected = max(len(self._waiting), self._expected - 1)

        # 2. Choose jobs that fit.
        batch: list[Job[Key, Row, Result]] = []
        n_rows = 0
        oldest = self._waiting[0]
        for job in self._waiting:
            if job.key != oldest.key:
                continue
            n_rows += len(job.rows)
            if batch and n_rows > self.max_rows:
                break
            batch.append(job)
        self._waiting = [job for job in self._waiting if job not in batch]
        return batch

    def _run(self, batch: Sequence[Job[Key, Row, Result]]) -> None:
        """Compute the jobs' results; jobs of a failed batch are retried one by one."""
        # 1. All rows together.
        rows: list[Row] = []
        for job in batch:
            rows += job.rows
        try:
            results = list(self._compute(batch[0].key, rows))
        except Exception as error:  # noqa: BLE001 its thread raises it
            if len(batch) == 1:
                batch[0].error = error
                return
            if is_out_of_memory(error):
                self.max_rows = max(self.max_rows // 2, 1)
            for job in batch:
                self._run([job])
            return
        except BaseException as error:  # noqa: BLE001
            # Ctrl-C, an exit: each thread raises it, nothing is tried again.
            for job in batch:
                job.error = error
            return

        # 2. Each job's share of the results.
        start = 0
        for job in batch:
            job.results = results[start : start + len(job.rows)]
            start += len(job.rows)

    def _compute(self, key: Key, rows: Sequence[Row]) -> Sequence[Result]:
        """The results of `work`, in the main thread or the worker."""
        if threading.current_thread() is threading.main_thread():
            return self.work(key, rows)
        return self._worker.submit(self.work, key, rows).result()


class ResultCache(Generic[Result]):
    """Results of the encoder by pixel content; the least recently used ones are dropped."""

    def __init__(self, max_entries: int) -> None:
        self.max_entries = max_entries
        self._results: dict[bytes, Result] = {}  # oldest use first

    def of(
        self, pixels: Sequence[Tensor], compute: Callable[[list[Tensor]], Sequence[Result]]
    ) -> list[Result]:
        """The result for each row of pixels.

        compute: called once, with the rows that are not cached.
        """
        # 1. Compute what is new; equal rows count once.
        digests = [_digest(row) for row in pixels]
        new: dict[bytes, Tensor] = {}
        for digest, row in zip(digests, pixels, strict=True):
            if digest not in self._results:
                new[digest] = row
        if new:
            self._results.update(zip(new, compute(list(new.values())), strict=True))

        # 2. The results become the most recently used ones, then the oldest are dropped.
        results: dict[bytes, Result] = {}
        for digest in dict.fromkeys(digests):
            results[digest] = self._results.pop(digest)
        self._results.update(results)
        for digest in list(self._results)[: -self.max_entries]:
            del self._results[digest]
        return [results[digest] for digest in digests]


def _digest(pixels: Tensor) -> bytes:
    return hashlib.blake2b(pixels.contiguous().cpu().numpy(), digest_size=16).digest()
