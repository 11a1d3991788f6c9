"""All tasks on two pretended CUDA devices: placements, precisions, races while weights move."""

import os
import sys
from pathlib import Path

import pretend_cuda
import pytest
from real_processes import run_process

SUPPORT = Path(pretend_cuda.__file__).parent
WHY = pretend_cuda.why_unavailable()

pytestmark = [pytest.mark.process, pytest.mark.nightly, pytest.mark.skipif(bool(WHY), reason=WHY)]


@pytest.fixture(scope="session")
def library_folder(tmp_path_factory) -> Path:
    """A folder of the compiled library for all workers of pytest-xdist."""
    return tmp_path_factory.getbasetemp().parent


def run(folder, script: str, *arguments: str):
    """Run a script of tests/support with pretended devices; fails with the lines of what failed."""
    command = [sys.executable, str(SUPPORT / "pretend_cuda.py"), str(SUPPORT / script), *arguments]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        pretend_cuda.FOLDER: str(folder),
    }
    finished = run_process(command, timeout=580, env=environment)
    lines = finished.stdout.splitlines()
    failures = [line for line in lines if not line.endswith(("ok", "s of a core"))]
    assert finished.returncode == 0 and lines, "\n".join(failures) or finished.stderr[-3000:]


@pytest.mark.timeout(600)
def test_moves_of_weights(library_folder):
    run(library_folder, "pretend_cuda_parts.py")


# Threads and placements are common to the families; precisions, devices and moves are each one's.
ALL = (
    "default precisions",
    "two devices",
    "threads",
    "offload",
    "offload, two devices",
    "offload, threads",
)
OWN = ("default precisions", "two devices", "offload")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "system, placements", [("nano", ALL), ("nano-x", OWN), ("nano-lavit", OWN)]
)
def test_all_tasks(system, placements, library_folder):
    run(library_folder, "pretend_cuda_tasks.py", system, *placements)
