"""A check that worker processes have ended."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator

import pytest


@pytest.fixture
def no_workers_left() -> Iterator[None]:
    """The test fails if child processes remain."""
    yield
    # Else each stopped training leaves workers that hold memory.
    end = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.05)
    assert not multiprocessing.active_children()
