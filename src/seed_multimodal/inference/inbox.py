"""`InboxThread`: a daemon thread that serves what other threads put into its inbox; `ForkLock`."""

from __future__ import annotations

import contextlib
import copy
import os
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Self, TypeVar

import torch

from seed_multimodal.inference.prompt import Stopped

CLOSE_SECONDS = 60  # how long the end of a program waits for the thread

Item = TypeVar("Item")


class InboxThread(ABC, Generic[Item]):
    """Base of objects that one daemon thread serves, from the first item on.

    The thread holds the object only while there is work, so that a dropped one is freed. A forked
    child begins with an empty inbox and gets a thread of its own.
    """

    def __init__(self, thread_name: str) -> None:
        self._thread_name = thread_name
        self._begin()
        _instances.add(self)

    @abstractmethod
    def serve(self) -> None:
        """Do the work of all items (`_take`); called by the thread."""

    def _begin(self) -> None:
        """Set the state without items and thread: at first, and in a forked child."""
        self._inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        # What the thread waits for: the object, once for each item. None: it ends.
        self._wakeups: queue.SimpleQueue[InboxThread[Item] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()
        self._closing = threading.Event()
        weakref.finalize(self, _close, self._wakeups, self._threads, self._closing)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with an empty inbox, and without thread."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(vars(self))
        copied._begin()
        for name, value in vars(self).items():
            if vars(copied)[name] is value:  # not of `_begin`
                setattr(copied, name, copy.deepcopy(value, memo))
        _instances.add(copied)
        return copied

    def _put(self, item: Item) -> None:
        """Add an item, from any thread."""
        with self._starting:
            if not self._threads:
                thread = threading.Thread(
                    target=_serve, args=(self._wakeups,), name=self._thread_name, daemon=True
                )
                self._threads.append(thread)
                thread.start()
        self._inbox.put(item)
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


class ForkLock:
    """A lock that its thread may take again; a forked child and a copy get a free one."""

    def __init__(self) -> None:
        self._begin()
        _instances.add(self)

    def _begin(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> ForkLock:
        return ForkLock()


_instances: weakref.WeakSet[InboxThread[Any] | ForkLock] = weakref.WeakSet()


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
