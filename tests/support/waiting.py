"""Waiting for what other threads do."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], seconds: float = 20):
    """Until a condition holds; AssertionError if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.005)
