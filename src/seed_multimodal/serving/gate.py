"""Waiting in line: so much inside at once, first come, first served; nobody waits for a client that left."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

from seed_multimodal.errors import RequestError

LOOK_SECONDS = 0.2  # how often somebody who waits looks whether the client is still there


class Vanished(RequestError):
    """Whoever asked has closed the connection, or the server is being stopped: nobody waits for the answer."""

    def __init__(self) -> None:
        super().__init__("The connection was closed before the answer was ready.")


class Gate:
    """Lets callers in as long as the sum of their weights stays within `capacity`: bytes, or 1 for a lock."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.inside = 0
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, weight: int = 1, gone: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Wait for a place of `weight` (at most the capacity) and keep it inside the block.

        Raises:
            Vanished: `gone()` became true in the line.
        """
        weight = min(weight, self.capacity)
        ticket = object()
        with self._changed:
            self._line.append(ticket)
            try:
                while self._line[0] is not ticket or self.inside + weight > self.capacity:
                    if gone():
                        raise Vanished
                    self._changed.wait(LOOK_SECONDS)
                self.inside += weight
            finally:
                self._line.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.inside -= weight
                self._changed.notify_all()
