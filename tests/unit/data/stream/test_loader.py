"""`load`: results of worker processes in order, and what happens when a worker ends."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from real_processes import run_process
from waiting import wait_until

from seed_multimodal.data.stream.loader import load
from seed_multimodal.errors import DataError


def arrays(job: int) -> dict:
    """Arrays in and out of shared memory, of types that samples have."""
    return {
        "image": torch.arange(60_000).reshape(100, 600)[:, ::2] * job,
        "few": torch.full((3,), job, dtype=torch.bfloat16),
        "ids": torch.arange(20_001, dtype=torch.int16) + job,
    }


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_load_of_arrays(no_workers_left):
    # A file descriptor of each of the 60 arrays would end a run of thousands of images. Those of
    # ending workers' pipes may be left for a moment.
    before = len(os.listdir("/proc/self/fd"))
    results = list(load(arrays, range(20), 2))
    assert len(os.listdir("/proc/self/fd")) - before < 40
    results[0]["ids"] += 1  # writable, and nobody else's
    for job, result in enumerate(results[1:], 1):
        assert all(map(torch.equal, result.values(), arrays(job).values()))


@pytest.mark.process
@pytest.mark.timeout(60)
def test_load_after_a_worker_was_killed(no_workers_left):
    # As by the kernel, when memory runs out: the run ends with a message instead of waiting.
    results = load(lambda job: bytes(1 << 20), range(100), workers=1)
    next(results)
    time.sleep(1)  # it writes the next result: a pipe holds 64 KiB
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match="worker"):
        list(results)


FULL_MEMORY = """
import torch
from seed_multimodal.data.stream.loader import load
from seed_multimodal.entry import run_guarded

def read(job):
    return torch.zeros(1_000_000)

raise SystemExit(run_guarded("program", False, lambda: len(list(load(read, range(20), 2)))))
"""


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(200)
def test_load_without_room_in_shared_memory():
    # As in a container: docker gives /dev/shm 64 MB.
    unshare = shutil.which("unshare")
    mount = "mount -t tmpfs -o size=2m none /dev/shm"
    if (
        unshare is None
        or subprocess.run([unshare, "-Urm", "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("this system allows no user mounts")
    program = [sys.executable, "-c", FULL_MEMORY]
    done = run_process(
        [unshare, "-Urm", "sh", "-c", f'{mount} && exec "$@"', "sh", *program],
        timeout=150,
    )
    assert done.returncode == 2, done.stderr
    assert "--shm-size" in done.stderr
    assert "Traceback" not in done.stderr


def runs(pid: str) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()


SCRIPT = """
import itertools, multiprocessing, os, signal, sys
from seed_multimodal.data.stream.loader import load

results = load(str, itertools.count(), 2)
next(results)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
raise KeyError("a training that fails")
"""


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("end, code", [("killed", -9), ("failed", 1)])
def test_workers_end_with_their_program(end, code):
    # Else each stopped run leaves processes that hold memory.
    done = run_process(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, end],
        timeout=150,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == code, done.stderr
    workers = done.stdout.split()
    assert len(workers) == 2
    wait_until(lambda: not any(map(runs, workers)), 30)
