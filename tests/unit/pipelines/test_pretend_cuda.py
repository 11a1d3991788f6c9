"""Everything that computes, on two pretended CUDA devices: the table of pretend_cuda_rows.py."""

import os
import sys
from pathlib import Path

import pretend_cuda
import pytest
from real_processes import run_process
from yaml_tables import read_tables

SUPPORT = Path(pretend_cuda.__file__).parent
TABLES = read_tables(str(SUPPORT / "pretend_cuda_rows.py"))
WHY = pretend_cuda.why_unavailable()
IS_REQUIRED = bool({"CI", "REQUIRE_DEVICES"} & os.environ.keys())

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # There is no other test of devices, so CI fails where they cannot be pretended.
    pytest.mark.skipif(bool(WHY) and not IS_REQUIRED, reason=WHY),
]


def run(*patterns: str):
    """Run rows in one process; fails with the lines of those that failed."""
    assert not WHY, WHY
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    scripts = [str(SUPPORT / name) for name in ("pretend_cuda.py", "pretend_cuda_rows.py")]
    finished = run_process([sys.executable, *scripts, *patterns], timeout=580, env=environment)
    rows = [line for line in finished.stdout.splitlines() if line.startswith("row | ")]
    failures = [row for row in rows if not row.endswith("| ok")]
    assert finished.returncode == 0 and rows, "\n".join([*failures, finished.stderr[-3000:]])


def test_rows_of_the_suite():
    run(*TABLES["suite"])


@pytest.mark.nightly
@pytest.mark.parametrize("group", TABLES["groups"])
def test_all_rows(group):
    run(f"{group}: *")
