"""A task out of a module and a loss function: the small stages, the tokenizers' trainings, the judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError
from seed_multimodal.settings import check_settings
from seed_multimodal.training.checkpoint_folders import checkpoints
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.loop import train
from seed_multimodal.training.loop_settings import SampleCost, StageSettings
from seed_multimodal.training.meter import SmoothedMeter
from seed_multimodal.training.optimizers import parameter_groups
from seed_multimodal.training.resume import refuse_other_numbers
from seed_multimodal.training.schedules import learning_rate
from seed_multimodal.training.task import Task

Loss = Callable[[nn.Module, int], tuple[Tensor, Mapping[str, Any]]]


class OwnState(Protocol):
    """State of one process, such as the samples it found unreadable; `state_dict` is JSON-able."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class StageTask(Task):
    """One stage.

    Args:
        module: everything that is trained and saved.
        loss: (model, micro-step) → (scalar mean loss, numbers to log); draws its randomness from torch's global
            generator, which is seeded before every call.
        finish: called once at the end, in the first process only (so no collective calls), with the final (EMA)
            weights in place; saves them and returns metrics that JSON can hold.
        after_step, status, schedule: as the methods of `Task`; `learning_rate` is linear warm-up and cosine.
        optimizer: trains (some of) the parameters of `module`; AdamW on all that need gradients by default.
        cost: of a sample, for the log's `tflops` and `mfu`.
        state: each process's own state; saved and restored with the checkpoints.
        wrapped_part: what several processes wrap and `loss` gets; `module` by default.
        parallel: False if `loss` calls parts of `module` past its `forward`, which no engine for several processes can
            follow.
    """

    def __init__(self, name: str, module: nn.Module, loss: Loss, settings: StageSettings, *,
                 finish: Callable[[], Mapping[str, Any]] = dict,
                 after_step: Callable[[int], Mapping[str, float] | None] | None = None,
                 status: Callable[[], Mapping[str, float]] = dict,
                 schedule: Callable[[int], float] | None = None, optimizer: Any = None,
                 cost: SampleCost | None = None, state: OwnState | None = None, wrapped_part: nn.Module | None = None,
                 parallel: bool = True, ddp_options: Mapping[str, Any] | None = None) -> None:
        check_settings(settings, f"[{name}]")
        self.name, self.module, self.settings, self.parallel = name, module, settings, parallel
        self.loss, self._finish, self._after_step, self._status = loss, finish, after_step, status
        self._schedule, self.state, self._wrapped_part = schedule, state, wrapped_part
        self.ddp_options = dict(ddp_options or {})
        self.optimizer = optimizer or torch.optim.AdamW(
            parameter_groups(module, settings.weight_decay), lr=settings.lr, betas=(0.9, 0.99))
        self.meter = SmoothedMeter(settings.batch_size * settings.accumulate, cost)

    @property
    def wrapped_part(self) -> nn.Module:
        """What the engine wraps."""
        return self.module if self._wrapped_part is None else self._wrapped_part

    def learning_rate(self, step: int) -> float:
        """The schedule."""
        return learning_rate(step, self.settings) if self._schedule is None else self._schedule(step)

    def micro_step(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """The loss. On CPUs attention by plain matrix products: the backward pass of the fused bf16 kernel is several
        times slower there."""
        if next(self.module.parameters()).device.type != "cpu":
            return self.loss(model, micro_step)
        with sdpa_kernel(SDPBackend.MATH):
            return self.loss(model, micro_step)

    def after_step(self, step: int) -> Mapping[str, float] | None:
        """Calls the function given."""
        return self._after_step(step) if self._after_step is not None else None

    def status(self) -> Mapping[str, float]:
        """Calls the function given."""
        return self._status()

    def finish(self) -> Mapping[str, Any]:
        """Calls the function given."""
        return self._finish()

    def gather_report(self, group: ProcessGroup) -> Mapping[str, Any]:
        """How large a step was."""
        shared = {"accumulate": self.settings.accumulate, "processes": group.world}
        return {"stage": self.name, "batch_size": self.settings.batch_size,
                **{key: count for key, count in shared.items() if count > 1}}

    def identity(self, world: int) -> dict[str, Any]:
        """Processes, and samples of a step over all of them: the order of samples follows from both."""
        return {"processes": world,
                "samples_per_step": self.settings.batch_size * self.settings.accumulate * world}

    def check_resume(self, folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        """Refuse another number of processes or of samples per step: the order of samples follows from both."""
        refuse_other_numbers(folder, saved, now, {"processes": "processes", "samples_per_step": "samples per step"},
                             self.start_hint)
        return []

    def state_dict(self, step: int) -> dict[str, Any]:
        """The `state` given."""
        return self.state.state_dict() if self.state is not None else {}

    def load_state_dict(self, states: list[dict[str, Any]], rank: int) -> None:
        """Inverse of `state_dict`."""
        if self.state is not None and states:
            self.state.load_state_dict(states[rank])


def train_stage(task: StageTask, folder: str | Path, group: ProcessGroup | None = None) -> dict[str, Any]:
    """Train a stage, or return the record of one that is done; see `loop.train`.

    `folder/NAME.done.json` is the record, whose presence makes later calls return at once, unless `further` is set,
    more steps are asked for and there is a checkpoint.
    """
    home = Path(folder)
    if group is None:
        with ProcessGroup() as own:
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
            return record
    return train(task, task.settings, home, group=group)


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
