"""The helpers of `pretrain_parts.py`, and one folder of tiny parts per session."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def parts() -> ModuleType:
    """The module `pretrain_parts`, which is slow to import."""
    import pretrain_parts

    return pretrain_parts


@pytest.fixture(scope="session")
def parts_dir(parts: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers, language model and data."""
    folder = tmp_path_factory.mktemp("lavit")
    parts.write_parts(folder)
    return folder
