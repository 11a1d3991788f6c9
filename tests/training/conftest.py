"""What the tests of the training loop share: the toy of loop_toy.py and a way to start it as a process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import warm_python

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loop_toy", HERE / "loop_toy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loop_toy"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start_toy() -> Callable[..., subprocess.Popen]:
    """start_toy(folder, stage, …, before=[command]) → the process that trains the stages."""
    def start(folder: Path, *stages: dict[str, Any], before: Sequence[str] = (warm_python.PYTHON,)) -> subprocess.Popen:
        source = HERE.parents[1] / "src"
        return subprocess.Popen([*before, str(HERE / "loop_toy.py"), str(folder), *map(json.dumps, stages)],
                                env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start
