"""The helpers of `tuning_parts.py`, and one folder of tiny parts per session."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def parts() -> ModuleType:
    """The module `tuning_parts`, which is slow to import."""
    import tuning_parts

    return tuning_parts


@pytest.fixture(scope="session")
def parts_dir(parts: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, vision encoder, language model and data."""
    folder = tmp_path_factory.mktemp("seed_x")
    parts.write_parts(folder)
    return folder
