"""`train_llm(config)` trains the language model by a composed configuration and returns the run's record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seed_multimodal.training.llm.task import LlmTask
from seed_multimodal.training.llm.trainer_settings import read_run
from seed_multimodal.training.trainer import run_task


def train_llm(config: Mapping[str, Any], kind: type[LlmTask] = LlmTask) -> dict[str, Any]:
    """Train by a resolved configuration; under torchrun every process calls it.

    Args:
        kind: the task; another one for a model with more parts than the language model.

    Returns:
        The run's record, also `output_dir/summary.json`: steps, seconds, tokens, last loss, evaluation, data, folder.

    Raises:
        SeedError, SystemExit: as `run_task`.
    """
    return run_task(read_run(config), kind)
