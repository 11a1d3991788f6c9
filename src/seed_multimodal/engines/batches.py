"""Batching of work from several threads, and a cache of results."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from seed_multimodal.device import is_out_of_memory
from seed_multimodal.language.generation import Stopped


@dataclass(eq=False)
class Job:
    """One thread's work; `key`: settings that must be equal in a batch; `results`: one per row."""

    key: Any
    rows: Sequence[Any]
    results: list[Any] | None = None
    error: BaseException | None = None


class Collector:
    """`collector(key, rows)` returns `work(key, rows)`, a list with a result per row; one thread at a time works on its
    own rows and those queued meanwhile.

    `most`: maximum rows of a joint batch. `wait`: seconds to wait for as many threads as recently; a single thread does
    not wait.
    """

    def __init__(self, work: Callable[[Any, Sequence[Any]], Sequence[Any]], most: int = 8, wait: float = 0.02) -> None:
        self.work, self.most, self.wait = work, most, wait
        self._waiting, self._busy, self._expected = list[Job](), False, 1
        self._changed = threading.Condition()

    def __call__(self, key: Any, rows: Sequence[Any], should_stop: Callable[[], bool] | None = None) -> list[Any]:
        """Raises what `work` raises for these rows alone; Stopped: `should_stop` was true before work on them."""
        job = Job(key, rows)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()
        while job.results is None and job.error is None:
            with self._changed:
                self._changed.wait_for(lambda: job.results is not None or job.error is not None or not self._busy, 0.2)
                if should_stop and job in self._waiting and should_stop():
                    self._waiting.remove(job)
                    raise Stopped
                if self._busy or job not in self._waiting:
                    continue
                self._busy = True
                batch = self._next()
            self._run(batch)
            with self._changed:
                self._busy = False
                self._changed.notify_all()
        if job.error is not None:
            raise job.error
        return job.results or []

    def _next(self) -> list[Job]:
        """The oldest waiting jobs with the same key."""
        if self._expected > 1:
            self._changed.wait_for(lambda: len(self._waiting) >= self._expected, self.wait)
        self._expected, batch, count = max(len(self._waiting), self._expected - 1), list[Job](), 0
        for job in [one for one in self._waiting if one.key == self._waiting[0].key]:
            count += len(job.rows)
            if batch and count > self.most:
                break
            batch.append(job)
        self._waiting = [one for one in self._waiting if one not in batch]
        return batch

    def _run(self, batch: Sequence[Job]) -> None:
        """Compute the jobs' results; jobs of a failed batch are retried one by one."""
        try:
            results = iter(self.work(batch[0].key, [row for job in batch for row in job.rows]))
            for job, made in [(job, [next(results) for _ in job.rows]) for job in batch]:
                job.results = made
        except BaseException as error:  # noqa: BLE001  its thread raises it
            if len(batch) == 1:
                batch[0].error = error
                return
            if is_out_of_memory(error):
                self.most = max(self.most // 2, 1)
            for job in batch:
                self._run([job])


class Remembered:
    """Cache of results by pixel content."""

    def __init__(self, most: int) -> None:
        self.most, self.known = most, dict[bytes, Any]()  # oldest use first

    def of(self, pixels: Sequence[Tensor], make: Callable[[list[Tensor]], Sequence[Any]]) -> list[Any]:
        """Results of `make` for each row of pixels; `make` is called once with the rows not in the cache."""
        names = [hashlib.blake2b(row.contiguous().cpu().numpy(), digest_size=16).digest() for row in pixels]
        new = {name: row for name, row in zip(names, pixels, strict=True) if name not in self.known}
        self.known |= zip(new, make([*new.values()]) if new else (), strict=True)
        used = {name: self.known.pop(name) for name in dict.fromkeys(names)}
        self.known |= used
        for name in [*self.known][:-self.most]:
            del self.known[name]
        return [used[name] for name in names]
