"""What the tests of the training loop share: the toy of loop_toy.py and a way to start it as a process."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import warm_python

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    import loop_toy  # where it is used: it is slow

    return loop_toy


@pytest.fixture
def start_toy() -> Callable[..., subprocess.Popen]:
    """start_toy(folder, stage, …, before=[command]) → the process that trains the stages."""
    def start(folder: Path, *stages: dict[str, Any], before: Sequence[str] = (warm_python.PYTHON,)) -> subprocess.Popen:
        source = HERE.parents[1] / "src"
        return subprocess.Popen([*before, str(HERE / "loop_toy.py"), str(folder), *map(json.dumps, stages)],
                                env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start
