"""A run from checked settings to its record: what trainings that are started by a configuration have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from seed_multimodal.quiet import quiet_libraries
from seed_multimodal.training.distributed import ProcessGroup, leave_processes, start_processes
from seed_multimodal.training.failures import translate_errors
from seed_multimodal.training.loop import train


def run_task(run: Any, kind: Callable[[Any, ProcessGroup, torch.device], Any]) -> dict[str, Any]:
    """Train by checked settings; under torchrun every process calls it.

    Args:
        run: the settings, with the sections `trainer` and `deepspeed`, and `output_dir`.
        kind: makes a `Task` of them that also has `settings`, whose `loop_settings()` are the loop's, and `close()`.

    Returns:
        The run's record, also `output_dir/summary.json`.

    Raises:
        SeedError: data, weights or a machine with which the run cannot continue; checkpoints stay intact.
        SystemExit: 143 after SIGTERM; the step was finished and saved.
    """
    quiet_libraries(libraries=("transformers", "diffusers", "DeepSpeed", "accelerate"))
    with translate_errors("the start", "nothing was trained yet"):
        group, device = start_processes(run.trainer.device, run.trainer.timeout_minutes,
                                        group_of_one=run.deepspeed is not None)
    clean = False
    try:
        with translate_errors("the start", "nothing was trained yet"):
            task = kind(run, group, device)
        with contextlib.closing(task):
            record = train(task, task.settings.loop_settings(), run.output_dir, group=group, device=device)
        clean = True
        return record
    except SystemExit:
        clean = True
        raise
    finally:
        leave_processes(clean)
