"""Going on: what a run finds in its output folder, and the LAVIS checkpoint that `run.resume_ckpt_path` starts it from.

Nothing is removed here: the record of a finished run that is asked for more epochs stays until the new one replaces it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from seed_lavis.checkpoint import read_checkpoint
from seed_lavis.log import log
from seed_lavis.options import locate
from seed_lavis.report import log_changes
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.training.ema import Ema
from seed_multimodal.training.loop_settings import StageSettings
from seed_multimodal.training.old.distributed import ProcessGroup
from seed_multimodal.training.old.state import StateFile, read_record

if TYPE_CHECKING:
    from seed_lavis.runner import RunnerSeed


def prepare_resume(runner: RunnerSeed, modules: nn.Module, settings: StageSettings) -> None:
    """Refuse, prepare or leave to the loop what earlier runs left in the output folder; all processes must call.

    Raises:
        ConfigError, CheckpointError: a run that must not go on, or could not with the same numbers.
    """
    state, done = (runner.output_dir / f"{runner.stage}.{kind}" for kind in ("state.pt", "done.json"))
    there, finished = state.is_file(), done.is_file()
    if runner.options.resume == "never" and (there or finished):
        raise ConfigError(f"{runner.output_dir}: holds a run of {runner.stage} already and run.resume is never; remove "
                          "the folder, choose another run.output_dir, or use run.resume=auto.")
    further = there and finished and _can_go_further(runner, done)
    if dist.is_initialized():
        dist.barrier()  # all have looked, before the first may write a state
    if there and (further or not finished):
        log_changes(runner)
    if not runner.options.resume_ckpt_path:
        return
    if there:
        log(f"{state}: this run's own state is there, so run.resume_ckpt_path is left aside.")
        return
    _state_from_checkpoint(runner, modules, settings)


def _can_go_further(runner: RunnerSeed, done: Path) -> bool:
    """Whether a finished run was asked for more epochs; refuses if it was another kind of run."""
    record = read_record(done)
    if int(record.get("steps", 0)) >= runner.steps:
        return False
    own = (runner.world, runner.options.batch_size_train, runner.accumulate)
    then = (record.get("processes", 1), record.get("batch_size"), record.get("accumulate", 1))
    if own != then:
        raise CheckpointError(
            f"{done}: the run before had {then[0]} processes of {then[1]} x {then[2]} samples per step, this one "
            f"has {own[0]} of {own[1]} x {own[2]}, so it would not go on with the same numbers; use the same "
            "again, or another run.output_dir with run.resume_ckpt_path.")
    return True


def _state_from_checkpoint(runner: RunnerSeed, modules: nn.Module, settings: StageSettings) -> None:
    """A LAVIS checkpoint becomes the state that the loop goes on from."""
    file = Path(locate(str(runner.options.resume_ckpt_path)))
    epochs = read_checkpoint(file, runner._model, runner.optimizer)
    if epochs >= runner.options.max_epoch:
        raise ConfigError(f"{file}: has {epochs} epochs behind it, so run.max_epoch={runner.options.max_epoch} "
                          f"leaves nothing to train; give run.max_epoch={epochs + 1} or more.")
    step = epochs * runner.steps_per_epoch
    with ProcessGroup(runner.stage, runner.model if dist.is_initialized() else None) as peers:
        average = Ema(modules, settings.ema) if settings.ema else None
        scaler = torch.amp.GradScaler(runner.device.type, enabled=settings.precision == "fp16")
        StateFile(runner.output_dir / f"{runner.stage}.state.pt", modules, runner.optimizer, average, scaler, peers,
                  settings.batch_size * settings.accumulate * peers.world, settings.save_frozen, begun=step,
                  ).save(step, 0.0)
    log(f"{file}: weights and optimiser taken; going on after {epochs} epochs.")
