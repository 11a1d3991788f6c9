"""The helpers of `pretrain_parts.py`, and one folder of tiny parts for a whole session."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def parts() -> ModuleType:
    """The module `pretrain_parts`."""
    name = "pretrain_parts"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def home(parts: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers, language model and data."""
    folder = tmp_path_factory.mktemp("lavit")
    parts.write_parts(folder)
    return folder
