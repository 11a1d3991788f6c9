"""A run of a pixel decoder's training, from checked settings to its record."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from seed_multimodal.quiet import quiet_libraries
from seed_multimodal.training.distributed import ProcessGroup, leave_processes, start_processes
from seed_multimodal.training.failures import translate_errors
from seed_multimodal.training.loop import train
from seed_multimodal.training.pixel_decoder.settings import PixelRun
from seed_multimodal.training.pixel_decoder.task import PixelTask


def train_pixels(run: PixelRun[Any], kind: Callable[[PixelRun[Any], ProcessGroup, torch.device], PixelTask]
                 ) -> dict[str, Any]:
    """Train by checked settings; under torchrun every process calls it.

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
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: task.batches.close() if hasattr(task, "batches") else None)
            record = train(task, task.settings.loop_settings(), run.output_dir, group=group, device=device)
        clean = True
        return record
    except SystemExit:
        clean = True
        raise
    finally:
        leave_processes(clean)
