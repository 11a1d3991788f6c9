"""Fixtures of the loaders' tests: checks that worker processes have ended."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def no_workers_left() -> Iterator[None]:
    """The test fails if child processes remain."""
    yield
    end = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


@pytest.fixture(scope="session")
def still_running() -> Callable[..., list[int]]:
    """`still_running(pids, seconds=30)`: the processes that have not ended within that time."""

    def runs(pid: int) -> bool:
        status = Path(f"/proc/{pid}/status")
        return status.is_file() and "State:\tZ" not in status.read_text()

    def wait(pids: Iterable[str | int], seconds: float = 30) -> list[int]:
        end = time.monotonic() + seconds
        while (left := [int(pid) for pid in pids if runs(int(pid))]) and time.monotonic() < end:
            time.sleep(0.2)
        return left

    return wait
