"""Training runs of the application in this process."""

from pathlib import Path

import llm_runs as runs
import pytest


@pytest.fixture
def train(tmp_path):
    """`train(NAME, *overrides, **groups)` trains in this process in tmp_path/NAME.

    Returns the output folder.
    """
    from seed_multimodal.training.llm.task import LlmTask

    def go(name, *more: str, **changes) -> Path:
        folder = tmp_path / "files"
        folder.mkdir(exist_ok=True)
        files = runs.write_files(folder, **changes)
        LlmTask.train(runs.compose(runs.overrides(files, tmp_path / name, *more)))
        return tmp_path / name

    return go
