"""Earlier files in a run's output folder, and the LAVIS checkpoint that `run.resume_ckpt_path` starts it from.

Nothing is removed here: the record of a finished run that is asked for more epochs stays until the new one replaces it.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from seed_lavis.checkpoint import read_checkpoint
from seed_lavis.context import RunContext
from seed_lavis.log import log
from seed_lavis.options import locate
from seed_multimodal.errors import ConfigError
from seed_multimodal.training.checkpoint import checkpoints
from seed_multimodal.training.task import StageTask


def prepare_resume(run: RunContext, task: StageTask) -> None:
    """Check, prepare or leave to the loop the files of earlier runs in the output folder; all processes must call it.

    Raises:
        ConfigError, CheckpointError: a run that must not be resumed, or a checkpoint that it cannot start from.
    """
    saved = bool(checkpoints(run.folder / task.checkpoint_folder))
    if run.options.resume == "never" and (saved or (run.folder / task.record_file).is_file()):
        raise ConfigError(f"{run.folder}: holds a run of {run.stage} already and run.resume is never; remove "
                          "the folder, choose another run.output_dir, or use run.resume=auto.")
    if not run.options.resume_ckpt_path:
        return
    if dist.is_initialized():
        dist.barrier()  # all processes have checked before the first may write a checkpoint
    if saved:
        log(f"{run.folder / task.checkpoint_folder}: this run's own checkpoints are there, so run.resume_ckpt_path is "
            "ignored.")
        return
    file = Path(locate(str(run.options.resume_ckpt_path)))
    epochs = read_checkpoint(file, run.model, task.optimizer)
    if epochs >= run.options.max_epoch:
        raise ConfigError(f"{file}: has {epochs} epochs behind it, so run.max_epoch={run.options.max_epoch} "
                          f"leaves nothing to train; give run.max_epoch={epochs + 1} or more.")
    task.first_step = epochs * run.steps_per_epoch
    log(f"{file}: weights and optimiser loaded; continuing after {epochs} epochs.")
