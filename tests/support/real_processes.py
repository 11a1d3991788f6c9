"""Programs that tests really start, kill and clean up."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

STARTED: list[subprocess.Popen[str]] = []  # what `nothing_stays_behind` ends


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[list[subprocess.Popen[str]]]:
    """Whatever a failed test leaves running ends with it. Import it into a test's module to use it."""
    STARTED.clear()
    yield STARTED
    for process in STARTED:
        kill(process, whole=True)


def kill(process: subprocess.Popen[str], whole: bool = False) -> None:
    """Kill a process that still runs; `whole`: with those that it has started, for a Python that is not a warm one (the
    first of these starts the server of all)."""
    for pid in [process.pid, *(children(process.pid) if whole else [])] if process.poll() is None else []:
        with contextlib.suppress(ProcessLookupError):  # it ended with its parent
            os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def processes_with(argument: str) -> list[int]:
    """Running Pythons with this text in their arguments, without torchrun's own."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process ended
            arguments = file.read_bytes().decode(errors="replace")
            if argument in arguments and "python" in arguments and "torchrun" not in arguments:
                found.append(int(file.parent.name))
    return found


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 200) -> None:
    """Until something has happened; at the latest until the process or the time has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None and not true():
        time.sleep(0.005)


def kill_when(true: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 200) -> str:
    """Kill a process once something has happened; gives what it said last (of stderr, if that is a pipe of its own)."""
    wait_until(true, process, seconds)
    kill(process)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, complained or said
    return complained or said


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])
