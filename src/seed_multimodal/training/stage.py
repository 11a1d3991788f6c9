"""The usual task, a module and a loss of each batch: the small stages, the tokenizers' trainings, the judge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError
from seed_multimodal.settings import check_settings
from seed_multimodal.training.checkpoint_folders import checkpoints, fault_of
from seed_multimodal.training.distributed import ProcessGroup, wait_limit
from seed_multimodal.training.loop import train
from seed_multimodal.training.loop_settings import StageSettings
from seed_multimodal.training.meter import Meter
from seed_multimodal.training.optimizers import parameter_groups
from seed_multimodal.training.resume import other_numbers, read_states, refuse_other_numbers, settings_remark
from seed_multimodal.training.schedules import check_kind, learning_rate
from seed_multimodal.training.task import Task


class StageTask(Task):
    """One stage; a subclass has `step_loss`, and overrides the methods of `Task` in which it differs.

    Args:
        module: everything that is trained and saved.
        optimizer: trains (some of) the parameters of `module`; AdamW on all that need gradients by default.
        parallel: False if the loss calls parts of `module` past its `forward`, which no engine for several processes
            can follow.
    """

    def __init__(self, name: str, module: nn.Module, settings: StageSettings, *, optimizer: Any = None,
                 parallel: bool = True) -> None:
        check_settings(settings, f"[{name}]")
        check_kind(settings.lr_scheduler_type, settings.lr_scheduler_kwargs)
        learning_rate(settings.steps - 1, settings)  # impossible options of a schedule end here
        self.name, self.module, self.settings, self.parallel = name, module, settings, parallel
        self.optimizer = optimizer or torch.optim.AdamW(
            parameter_groups(module, settings.weight_decay), lr=settings.lr, betas=(0.9, 0.99))
        self.meter = Meter(settings.batch_size * settings.accumulate)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """Scalar mean loss of a micro-step, and numbers to log; draws its randomness from torch's global generator,
        which is seeded before every call."""
        raise NotImplementedError

    def learning_rate(self, step: int) -> float:
        """Linear warm-up and, by default, a cosine."""
        return learning_rate(step, self.settings)

    def micro_step(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """The loss. On CPUs attention by plain matrix products: the backward pass of the fused bf16 kernel is several
        times slower there."""
        if next(self.module.parameters()).device.type != "cpu":
            return self.step_loss(model, micro_step)
        with sdpa_kernel(SDPBackend.MATH):
            return self.step_loss(model, micro_step)

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        """How large a step was; subclasses add their measures."""
        shared = {"accumulate": self.settings.accumulate, "processes": group.world}
        return {"stage": self.name, "batch_size": self.settings.batch_size,
                **{key: count for key, count in shared.items() if count > 1}}

    def identity(self, world: int) -> dict[str, Any]:
        """Processes, and samples of a step over all of them, from which their order follows."""
        return {"processes": world,
                "samples_per_step": self.settings.batch_size * self.settings.accumulate * world}

    def check_resume(self, folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        """Refuse another number of samples per step, from which their order follows; another number of processes, which
        share them out in another way, is a remark."""
        refuse_other_numbers(folder, saved, now, {"samples_per_step": "samples per step"}, self.start_hint)
        return other_numbers(saved, now, {"processes": "processes"})


def train_stage(task: StageTask, folder: str | Path, group: ProcessGroup | None = None) -> dict[str, Any]:
    """Train a stage, or return the record of one that is done; see `loop.train`.

    `folder/NAME.done.json` is the record, whose presence makes later calls return at once, unless `further` is set,
    more steps are asked for and there is a checkpoint.
    """
    home = Path(folder)
    if group is None:
        with ProcessGroup(wait_limit(task.settings.timeout_minutes)) as own:
            return train_stage(task, home, own)
    done = home / task.record_file
    here = done.is_file()
    someone, someone_not = group.agree(here, not here)
    if someone and someone_not:
        raise CheckpointError(f"{done}: only some processes see it; the folder must be on a disk that all share.")
    if here:
        record = read_record(done)
        if not (task.settings.further and int(record.get("steps", 0)) < task.settings.steps
                and checkpoints(home / task.checkpoint_folder)):
            if group.first:
                print(f"[{task.name}] already done ({record.get('seconds', 0):.0f} s): {done}", flush=True)
                remark = _remark(task, home / task.checkpoint_folder)
                if remark:
                    print(f"[{task.name}] {remark}; remove {done} and {home / task.checkpoint_folder} to train it "
                          "again.", flush=True)
            return record
    return train(task, task.settings, home, group=group)


def _remark(task: StageTask, folder: Path) -> str:
    """Which settings the run that is done had otherwise, as `settings_remark`; nothing without its checkpoint."""
    newest = next((path for _, path in checkpoints(folder) if not fault_of(path, hashes=False)), None)
    before = read_states(newest).trainer.get("config") if newest is not None else None
    return settings_remark(before, task.config, task.quiet_keys) if before and task.config else ""


def read_record(file: Path) -> dict[str, Any]:
    """The record of a stage that is done.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return read_json_object(file)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{str(error).rstrip('.')}; remove it, and the stage resumes from its checkpoint."
                              ) from error
