"""Requests that wait for the one model: so many at most, answered one at a time."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator

from seed_multimodal.errors import SeedError

LOOK_SECONDS = 0.2  # how often a waiting request checks whether its client is still connected


class Busy(SeedError):
    """Too many requests wait; `seconds`: after which a client may try again."""

    def __init__(self, waiting: int, seconds: int) -> None:
        self.seconds = seconds
        super().__init__(f"The model is busy and {waiting} requests wait already; try again in {seconds} seconds.")


class Vanished(SeedError):
    """The client has disconnected, or the server is being stopped."""

    def __init__(self) -> None:
        super().__init__("The connection was closed before the answer was ready.")


class Queue:
    """Counts requests, and lets one at a time use the model."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting, self.admitted, self.answered = max_waiting, 0, 0
        self._model, self._counting = threading.Lock(), threading.Lock()
        self._seconds = 1.0  # of one answer, on average

    @property
    def busy(self) -> bool:
        return self._model.locked()

    @contextlib.contextmanager
    def admission(self) -> Iterator[None]:
        """Count a request among those that wait or are answered.

        Raises:
            Busy: too many are.
        """
        with self._counting:
            if self.admitted > self.max_waiting:  # one of them is being answered
                raise Busy(self.max_waiting, min(max(math.ceil(self._seconds * self.admitted), 1), 600))
            self.admitted += 1
        try:
            yield
        finally:
            with self._counting:
                self.admitted -= 1

    @contextlib.contextmanager
    def turn(self, left: Callable[[], bool]) -> Iterator[None]:
        """Wait for the model, and use it inside.

        Raises:
            Vanished: `left()` became true while the request waited.
        """
        while not self._model.acquire(timeout=LOOK_SECONDS):
            if left():
                raise Vanished
        start = time.monotonic()
        try:
            yield
            self.answered += 1
            self._seconds += 0.2 * (time.monotonic() - start - self._seconds)
        finally:
            self._model.release()
