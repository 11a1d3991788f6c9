"""`train_llm(config)` trains the language model by a composed configuration and returns the run's record."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from seed_multimodal.quiet import quiet_libraries
from seed_multimodal.training.distributed import leave_processes, start_processes
from seed_multimodal.training.failures import translate_errors
from seed_multimodal.training.llm.task import LlmTask
from seed_multimodal.training.llm.trainer_settings import read_run
from seed_multimodal.training.loop import train


def train_llm(config: Mapping[str, Any], kind: type[LlmTask] = LlmTask) -> dict[str, Any]:
    """Train by a resolved configuration; under torchrun every process calls it.

    Args:
        kind: the task; another one for a model with more parts than the language model.

    Returns:
        The run's record, also `output_dir/summary.json`: steps, seconds, tokens, last loss, evaluation, data, folder.

    Raises:
        SeedError: settings, data, weights or a machine with which the run cannot continue; checkpoints stay intact.
        SystemExit: 143 after SIGTERM; the step was finished and saved.
    """
    run = read_run(config)
    quiet_libraries(libraries=("transformers", "DeepSpeed", "accelerate"))
    with translate_errors("the start", "nothing was trained yet"):
        group, device = start_processes(run.trainer.device, run.trainer.timeout_minutes,
                                        group_of_one=run.deepspeed is not None)
    clean = False
    try:
        with translate_errors("the start", "nothing was trained yet"):
            task = kind(run, group, device)
        with contextlib.closing(task.data):
            record = train(task, task.settings.loop_settings(), run.output_dir, group=group, device=device)
        clean = True
        return record
    except SystemExit:
        clean = True
        raise
    finally:
        leave_processes(clean)
