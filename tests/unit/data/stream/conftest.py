"""A check that worker processes have ended."""

import multiprocessing
from collections.abc import Iterator

import pytest
from waiting import wait_until


@pytest.fixture
def no_workers_left() -> Iterator[None]:
    """The test fails if child processes remain."""
    yield
    # Else each stopped training leaves workers that hold memory.
    wait_until(lambda: not multiprocessing.active_children(), 10)
