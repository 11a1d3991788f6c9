"""The toy of loop_toy.py for the tests of the training loop, in this process or another."""

import json
import subprocess
import sys
from collections.abc import Sequence

import pytest
from llm_runs import environment
from repository import ROOT


@pytest.fixture
def start_toy():
    """start_toy(folder, stage, …, before=[command]) → the process that trains the stages."""

    def start(folder, *stages: dict, before: Sequence[str] = (sys.executable,)) -> subprocess.Popen:
        toy = ROOT / "tests" / "support" / "loop_toy.py"
        return subprocess.Popen(
            [*before, str(toy), str(folder), *map(json.dumps, stages)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start
