"""The trainer's interface to a task, and the usual task: a module and a loss per batch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import CheckpointError
from seed_multimodal.settings import check_settings
from seed_multimodal.state_dicts import assign_strictly, load_state_dict, save_state_dict
from seed_multimodal.training.config import (
    ConfigNode,
    StageSettings,
    TrainerSettings,
    check_schedule,
)
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.metrics import Meter, Metrics
from seed_multimodal.training.optimizers import parameter_groups
from seed_multimodal.training.schedules import learning_rate

if TYPE_CHECKING:
    from seed_multimodal.training.trainer import Trainer

WEIGHTS = "model.safetensors"


class Task:
    """Everything that differs between trainings; methods are called by the trainer.

    Attributes:
        name: prefix of console lines and of the files NAME.log.jsonl and NAME.done.json.
        settings: of the trainer.
        module: the trained and saved module.
        optimizer: of (some of) the module's parameters.
        meter: aggregates numbers of steps into log lines.
        first_step: steps of an earlier run in another format, whose weights and optimizer are
            already loaded.
        parallel: whether several processes may train it.
        sample_steps, eval_steps: steps between samples and between evaluations (0: none); there is
            also an evaluation at the end.
        loss_reduction: how a step's loss follows from those of its micro-steps.
        ddp_options: of DistributedDataParallel. Buffers are not broadcast: they are constants or
            kept equal by the task, and processes may make unequal numbers of forward passes in a
            step.
        deepspeed: DeepSpeed's configuration, for its engine; with `rows`, the sequences of a
            micro-step in each process, and `width` of the model for "auto" values.
        config: the resolved configuration.
        quiet_keys: keys of the configuration whose change is not reported on resume.
        fixed_on_resume: values of `identity` that must be those of the checkpoint → nouns for
            messages.
        reported_on_resume: values whose change is reported → nouns.
        start_hint: option that initializes a new run from another run's weights.
        trainer: set when all is restored, before the first step.
    """

    name: str
    settings: TrainerSettings
    module: nn.Module
    optimizer: torch.optim.Optimizer
    meter: Meter
    first_step: int = 0
    parallel: bool = True
    sample_steps: int = 0
    eval_steps: int = 0
    loss_reduction: Literal["mean", "sum"] = "mean"
    ddp_options: Mapping[str, bool] = MappingProxyType({"broadcast_buffers": False})
    deepspeed: ConfigNode | None = None
    rows: int
    width: int
    config: ConfigNode | None = None
    quiet_keys: Sequence[str] = ()
    fixed_on_resume: Mapping[str, str] = MappingProxyType({})
    reported_on_resume: Mapping[str, str] = MappingProxyType({})
    start_hint: str = "`start`"
    trainer: Trainer

    @property
    def record_file(self) -> str:
        """File name of the completed run's record."""
        return f"{self.name}.done.json"

    @property
    def checkpoint_folder(self) -> str:
        """Subfolder of the checkpoints in the run's folder ("": the folder itself)."""
        return f"{self.name}.checkpoints"

    @property
    def saves_frozen(self) -> bool:
        """Whether checkpoints always have the frozen weights of `module`, too."""
        return False

    def prepare(self) -> None:
        """Build `module` and `optimizer`; called after the resume checks."""

    def before_training(self) -> None:
        """Called after restoring, before the first step."""

    def learning_rate(self, step: int) -> float:
        """Rate of optimizer step `step` (from 0); multiplied by a group's `lr_scale`."""
        raise NotImplementedError

    def begin_step(self, step: int) -> bool:
        """Called before the first micro-step of a step; False: the data of all processes have
        ended."""
        return True

    def micro_step(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Metrics]:
        """Loss of one micro-batch by `model` (the engine's `module`), and numbers to log.

        micro_step: step · gradient_accumulation_steps + index in the step. torch's generators are
            seeded from (seed, micro_step, rank) before each call.
        """
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after each optimizer step with the number of completed steps.

        Weights may be changed if equally in all processes.
        """

    def write_samples(self, step: int) -> None:
        """Called in the first process when samples are due; as `evaluate`."""

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Evaluation numbers to log; with the averaged weights if the run averages.

        The time of the call does not count in the speed.
        """
        return {}

    def status(self) -> Mapping[str, float]:
        """Further numbers of a log line.

        Counts (int) are summed over processes, measures (float) averaged; `wait_seconds` is all
        time spent waiting for data, logged as `wait_share`.
        """
        return {}

    def finish(self, group: ProcessGroup) -> Mapping[str, object]:
        """Called at the end: save the final weights (first process); returns further values of the
        record."""
        return {}

    def summary(self, record: JsonObject) -> list[str]:
        """Lines of the final summary."""
        return [f"done: {json.dumps(record)}"]

    def identity(self, world: int) -> JsonObject:
        """Values for trainer_state.json, for `checkpoint.resume_remarks`."""
        return {"world_size": world}

    def frozen_models(self) -> Mapping[str, Sequence[float]]:
        """Name -> `weights.fingerprint` of frozen models outside of `module`."""
        return {}

    def state_dict(self, step: int) -> JsonObject:
        """State of this process (data position, bad samples), JSON-serializable."""
        return {}

    def load_state_dict(self, states: list[JsonObject], rank: int) -> None:
        """Restore from the `state_dict`s of all processes, by rank."""

    def weights(self, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The module's weights in a checkpoint.

        gathered: trained weights of `module` from a sharded engine (with the frozen ones if
            `saves_frozen`).
        """
        return dict(self.module.state_dict() if gathered is None else gathered)

    def save_files(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the weights (and tokenizer files etc.) into a checkpoint; first process."""
        save_state_dict(weights, folder / WEIGHTS)

    def load_weights(self, folder: Path, allow_missing: Sequence[str] = ()) -> None:
        """Load a checkpoint into the module. Raises CheckpointError: weights of another model."""
        file = folder / WEIGHTS
        if not file.is_file():
            raise CheckpointError(f"{folder}: contains no {WEIGHTS}.")
        assign_strictly(self.module, load_state_dict(file), file, allow_missing=list(allow_missing))


class StageTask(Task):
    """One stage; subclasses define `step_loss` and override methods of `Task`.

    Args:
        optimizer: by default AdamW on all parameters of `module` with gradients.
        parallel: False if the loss calls submodules of `module` without its `forward`.
    """

    fixed_on_resume = MappingProxyType({"samples_per_step": "samples per step"})
    reported_on_resume = MappingProxyType({"processes": "processes"})
    settings: StageSettings

    def __init__(
        self,
        name: str,
        module: nn.Module,
        settings: StageSettings,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        parallel: bool = True,
    ) -> None:
        check_settings(settings, f"[{name}]")
        check_schedule(settings, f"[{name}]")
        self.name = name
        self.module = module
        self.settings = settings
        self.parallel = parallel
        self.optimizer = optimizer or torch.optim.AdamW(
            parameter_groups(module.parameters(), settings.weight_decay),
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
        )
        self.meter = Meter(settings.batch_size * settings.gradient_accumulation_steps)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Metrics]:
        """As `micro_step`."""
        raise NotImplementedError

    def learning_rate(self, step: int) -> float:
        """By `StageSettings`."""
        return learning_rate(step, self.settings)

    def micro_step(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Metrics]:
        """The loss, with `attention_kernel`."""
        with attention_kernel(next(self.module.parameters()).device):
            return self.step_loss(model, micro_step)

    def finish(self, group: ProcessGroup) -> Mapping[str, object]:
        """Step size; subclasses add their metrics."""
        values: JsonObject = {"stage": self.name, "batch_size": self.settings.batch_size}
        if self.settings.gradient_accumulation_steps > 1:
            values["accumulate"] = self.settings.gradient_accumulation_steps
        if group.world > 1:
            values["processes"] = group.world
        return values

    def identity(self, world: int) -> JsonObject:
        """Number of processes and samples per step, which determine the sample order."""
        micro_steps = self.settings.gradient_accumulation_steps
        return {
            "processes": world,
            "samples_per_step": self.settings.batch_size * micro_steps * world,
        }


def attention_kernel(device: torch.device) -> AbstractContextManager[object]:
    """Context in which attention on a CPU uses plain matrix products, since the backward pass of
    the fused bf16 kernel is several times slower."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
