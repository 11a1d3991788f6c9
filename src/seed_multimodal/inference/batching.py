"""Work of several threads that one thread does: the engine's answers, batches of images.

`InboxThread`: a daemon thread that serves what other threads put into its inbox; `DynamicBatcher`:
one for the encoding or drawing of images; `ResultCache`, and the `weights_state` that it is of.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import queue
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from seed_multimodal.device import is_out_of_memory
from seed_multimodal.inference.prompt import Stopped

POLL_SECONDS = 0.2  # between two looks at `should_stop` while waiting
CLOSE_SECONDS = 60  # how long the end of a program waits for the thread
SHARE = 0.9  # of a matrix's shorter side: the distance of two sampled numbers
# Attributes of PEFT's layers.
ADAPTER_SWITCHES = ("_disable_adapters", "_active_adapter", "scaling")

Item = TypeVar("Item")
Key = TypeVar("Key")
Row = TypeVar("Row")
Result = TypeVar("Result")


class ThreadState(ABC):
    """Base of objects with locks, queues and threads: a forked child, a copy and a pickle get their
    own ones."""

    def __init__(self) -> None:
        before = set(vars(self))
        self._begin()
        self._own = vars(self).keys() - before  # names of what `_begin` sets
        _instances.add(self)

    @abstractmethod
    def _begin(self) -> None:
        """Set locks, queues and threads: at first, in a forked child, and in a copy."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self._own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()
        _instances.add(self)


_instances: weakref.WeakSet[ThreadState] = weakref.WeakSet()


class InboxThread(ThreadState, Generic[Item]):
    """Base of objects that one daemon thread serves, from the first item on.

    The thread holds the object only while there is work, so that a dropped one is freed. A forked
    child begins with an empty inbox and gets a thread of its own.
    """

    def __init__(self, thread_name: str) -> None:
        self._thread_name = thread_name
        super().__init__()

    @abstractmethod
    def serve(self) -> None:
        """Do the work of all items (`_take`); called by the thread."""

    def _begin(self) -> None:
        self._inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        # What the thread waits for: the object, once for each item. None: it ends.
        self._wakeups: queue.SimpleQueue[InboxThread[Item] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()
        self._closing = threading.Event()
        weakref.finalize(self, _close, self._wakeups, self._threads, self._closing)

    def _put(self, item: Item) -> None:
        """Add an item, from any thread. Where none can be started, as from Python 3.12 on once the
        main thread has ended, the caller serves it."""
        self._inbox.put(item)
        with self._starting:
            if not self._threads:
                thread = threading.Thread(
                    target=_serve, args=(self._wakeups,), name=self._thread_name, daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:
                    self.serve()
                    return
                self._threads.append(thread)
        self._wakeups.put(self)

    def _take(self, wait: float = 0) -> list[Item]:
        """The new items, which `wait` seconds may bring. Raises Stopped: the program ends."""
        if self._closing.is_set():
            raise Stopped
        items: list[Item] = []
        try:
            items.append(self._inbox.get(wait > 0, wait))
            while True:
                items.append(self._inbox.get_nowait())
        except queue.Empty:
            return items


def _serve(wakeups: queue.SimpleQueue[InboxThread[Item] | None]) -> None:
    """The thread; without work it holds neither the object nor its model."""
    with contextlib.suppress(Stopped):
        while (served := wakeups.get()) is not None:
            served.serve()
            del served


def _close(
    wakeups: queue.SimpleQueue[InboxThread[Item] | None],
    threads: Sequence[threading.Thread],
    closing: threading.Event,
) -> None:
    """End the thread: when the object is freed, or at the end of the program, where Python would
    abort if the thread still computed."""
    closing.set()
    wakeups.put(None)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(CLOSE_SECONDS)


def _begin_in_child() -> None:
    """In a forked child: no thread was copied, neither ours nor those of OpenMP, for which torch
    would wait for ever if it computed with several."""
    for instance in list(_instances):
        if isinstance(instance, InboxThread) and instance._threads:
            torch.set_num_threads(1)
        instance._begin()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_begin_in_child)


class Job(Generic[Key, Row, Result], Future[list[Result]]):
    """The rows of one thread, and their results.

    key: settings that must be equal in a batch.
    """

    def __init__(self, key: Key, rows: Sequence[Row]) -> None:
        super().__init__()
        self.key = key
        self.rows = rows


class DynamicBatcher(InboxThread[Job[Key, Row, Result]], Generic[Key, Row, Result]):
    """`batcher(key, rows)` returns `work(key, rows)`, a list with a result for each row.

    Rows of several threads are computed together, by one thread, because matrix libraries keep
    buffers and workers for each thread that has computed: 250 MB in nano's server. The main thread
    computes its own rows itself, so that Ctrl-C ends them.

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
        super().__init__("seed-images")

    def _begin(self) -> None:
        super()._begin()
        self._waiting: list[Job[Key, Row, Result]] = []
        self._computing = threading.Lock()
        self._expected = 1  # threads that are likely to bring work soon

    def __call__(
        self, key: Key, rows: Sequence[Row], should_stop: Callable[[], bool] | None = None
    ) -> list[Result]:
        """The results of `work`; raises what it raises for these rows alone.

        should_stop: asked before work on the rows begins; true raises `Stopped`.
        """
        if not rows:
            return []
        if should_stop and should_stop():
            raise Stopped
        if threading.current_thread() is threading.main_thread():
            with self._computing:
                return list(self.work(key, rows))
        job: Job[Key, Row, Result] = Job(key, rows)
        self._put(job)
        while not wait_for([job], POLL_SECONDS).done:
            if should_stop and should_stop() and job.cancel():
                raise Stopped
        return job.result()

    def serve(self) -> None:
        self._waiting += self._take()
        while self._waiting:
            batch = self._next_batch()
            self._run([job for job in batch if job.set_running_or_notify_cancel()])
            self._waiting += self._take()

    def _next_batch(self) -> list[Job[Key, Row, Result]]:
        """The oldest waiting jobs with the same key."""
        # 1. Wait for the threads that brought work recently, until they have or do not come.
        deadline = time.monotonic() + self.wait
        while len(self._waiting) < self._expected and time.monotonic() < deadline:
            self._waiting += self._take(deadline - time.monotonic())
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
            with self._computing:
                results = list(self.work(batch[0].key, rows)) if batch else []
        except Exception as error:  # noqa: BLE001 its thread raises it
            if len(batch) == 1:
                batch[0].set_exception(error)
                return
            if is_out_of_memory(error):
                self.max_rows = max(self.max_rows // 2, 1)
            for job in batch:
                self._run([job])
            return

        # 2. Each job's share of the results.
        start = 0
        for job in batch:
            job.set_result(results[start : start + len(job.rows)])
            start += len(job.rows)


class ResultCache(Generic[Result]):
    """Results of the encoder by pixel content; the least recently used ones are dropped."""

    def __init__(self, max_entries: int) -> None:
        self.max_entries = max_entries
        self._state: object = None
        self._results: OrderedDict[bytes, Result] = OrderedDict()  # oldest use first

    def of(
        self,
        pixels: Sequence[Tensor],
        compute: Callable[[list[Tensor]], Sequence[Result]],
        state: object,
    ) -> list[Result]:
        """The result for each row of pixels.

        compute: called once, with the rows that are not cached.
        state: what `compute` depends on; results of another state are dropped.
        """
        # 1. Compute what is new; equal rows count once.
        if state != self._state:
            self._state = state
            self._results.clear()
        digests: list[bytes] = []
        for row in pixels:
            content = row.contiguous().cpu().numpy()
            digests.append(hashlib.blake2b(content, digest_size=16).digest())
        new = {
            digest: row
            for digest, row in zip(digests, pixels, strict=True)
            if digest not in self._results
        }
        if new:
            self._results.update(zip(new, compute(list(new.values())), strict=True))

        # 2. They become the most recently used ones, then the oldest are dropped.
        results: list[Result] = []
        for digest in digests:
            self._results.move_to_end(digest)
            results.append(self._results[digest])
        while len(self._results) > self.max_entries:
            self._results.popitem(last=False)
        return results


# ---- which weights results are of


@torch.no_grad()
def weights_state(module: nn.Module) -> object:
    """A value that changes with the weights, and that switched adapters and hooks change.

    It has what torch counts (changes in place, other tensors, layers and hooks) and, for changes
    through `.data`, numbers of each row and each column of every matrix. Not seen are changes of
    single numbers through `.data`, of what hooks hold, and of a layer's other attributes.
    """
    # 1. Layers, and what can be switched on and off.
    layers: list[nn.Module | None] = [module]
    tensors: list[Tensor | None] = []
    state: list[object] = []
    for layer in layers:  # which grows
        if layer is None:
            continue
        own = layer.__dict__
        layers += own["_modules"].values()
        tensors += own["_parameters"].values()
        tensors += own["_buffers"].values()
        if layer._forward_pre_hooks or layer._forward_hooks:
            state += [*layer._forward_pre_hooks, *layer._forward_hooks]
        if "_disable_adapters" in own:
            state.append(str([own.get(name) for name in ADAPTER_SWITCHES]))
        if "forward" in own:  # in place of the class's own
            state.append(own["forward"])
    state += map(id, layers)
    state += map(type, layers)

    # 2. Counters and numbers of the tensors; those of a group are joined quickly.
    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        if tensor is None or type(tensor) not in (nn.Parameter, Tensor):  # of quantized weights
            state.append(id(tensor))
            continue
        state.append(tensor.data_ptr())
        state.append(0 if tensor.is_inference() else tensor._version)
        samples = _samples(tensor.shape)
        if samples and tensor.is_contiguous():
            tensor = tensor.as_strided(*samples)
        elif tensor.ndim != 1:
            tensor = tensor.flatten()
        group = (tensor.get_device(), tensor.dtype, samples is None)
        groups.setdefault(group, []).append(tensor)
    joined = [torch.cat(samples).view(torch.uint8) for samples in groups.values()]
    return state, [numbers.cpu().numpy().tobytes() for numbers in joined]


@functools.cache
def _samples(shape: torch.Size) -> tuple[tuple[int], tuple[int]] | None:
    """The size and the stride of the sampled numbers of a tensor; None: all of a vector."""
    if len(shape) < 2 or not shape.numel():
        return None
    # Below both sides, so that no row is left out; prime to the width, so that no column is.
    width = max(shape[-1], shape.numel() // shape[0], key=lambda n: min(n, shape.numel() // n))
    step = max(int(SHARE * min(width, shape.numel() // width)), 1)
    while math.gcd(step, width) > 1:
        step -= 1
    return (math.ceil(shape.numel() / step),), (step,)
