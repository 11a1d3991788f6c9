"""Start, kill and clean up processes."""

import contextlib
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence

import psutil
import pytest
import waiting

STARTED: list[subprocess.Popen[str]] = []  # killed by `nothing_stays_behind`


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[list[subprocess.Popen[str]]]:
    """Kill the processes that a failed test leaves running. To use it, import it into the test's
    module."""
    STARTED.clear()
    yield STARTED
    for process in STARTED:
        kill(process, group=True)


def run_process(
    command: Sequence[str], timeout: float | None = None, **options
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with its outputs as text."""
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)


def run_checked(*arguments, **options) -> subprocess.CompletedProcess[str]:
    """`run_process` of a command that must succeed."""
    done = run_process(*arguments, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def kill(process, group: bool = False):
    """Kill a process that still runs; `group`: with its children."""
    if process.poll() is not None:
        return
    started = psutil.Process(process.pid)
    for part in [started, *(started.children() if group else [])]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with its parent
            part.kill()


def processes_with(argument: str) -> list[int]:
    """Running Python processes with this text in their arguments, without torchrun itself."""
    pids = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if argument in command and "python" in command and "torchrun" not in command:
            pids.append(process.pid)
    return pids


def wait_until(true: Callable[[], bool], process, seconds: float = 200):
    """Until `true()` or the end of the process; AssertionError after the timeout."""
    waiting.wait_until(lambda: true() or process.poll() is not None, seconds)


def kill_when(true: Callable[[], bool], process) -> str:
    """Kill a process once `true()`; returns its last output (stderr, if that is a separate
    pipe)."""
    wait_until(true, process)
    kill(process)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors or output
    return errors or output


def free_port() -> int:
    """A free port of the loopback address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
