"""One folder of the tiny parts of `tuning_parts.py` per session, and configurations over it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tuning_parts


@pytest.fixture(scope="session")
def parts_dir(tmp_path_factory) -> Path:
    """Tokenizer, vision encoder, language model and data."""
    folder = tmp_path_factory.mktemp("seed_x")
    tuning_parts.write_parts(folder)
    return folder


@pytest.fixture(scope="session")
def config_of(parts_dir: Path) -> Callable[..., dict[str, Any]]:
    """`config_of(output, **changes)`: a whole configuration on these parts."""
    return partial(tuning_parts.config_of, parts_dir)
