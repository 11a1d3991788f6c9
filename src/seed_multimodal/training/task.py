"""The contract of trainer and task, and the usual task: a module and a loss per batch."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

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
    from seed_multimodal.data.stream.step_batches import StepBatches

WEIGHTS = "model.safetensors"


class Task:
    """Everything that differs between trainings; methods are called by the trainer.

    A task defines what is trained (`prepare`: `module`, `optimizer`), what must be equal when it
    resumes (`identity`, `frozen_models`), its data (`begin_step`, `state_dict`), the `loss`, how it
    is evaluated (`evaluate`, `write_samples`) and saved (`published`, `save`, `load`, `finish`).

    Attributes:
        name: prefix of console lines and of the files NAME.log.jsonl and NAME.done.json.
        settings: of the trainer.
        module: the trained and saved module.
        optimizer: of (some of) the module's parameters.
        meter: aggregates numbers of steps into log lines.
        step_batches: the data, whose bad samples and waiting are logged and saved; for another kind
            of data the task defines `status`, `state_dict` and `load_state_dict`.
        first_step: steps of an earlier run in another format, whose weights and optimizer are
            already loaded.
        parallel: whether several processes may train it.
        sample_steps, eval_steps: steps between samples and between evaluations (0: none); there is
            also an evaluation at the end.
        loss_reduction: how a step's loss follows from those of its micro-steps.
        plain_attention: on a CPU attention uses plain matrix products, since the backward pass of
            the fused bf16 kernel is several times slower.
        after_step: called after each optimizer step with the number of completed steps; may change
            weights if equally in all processes.
        ddp_options: of DistributedDataParallel. Buffers are not broadcast: they are constants or
            kept equal by the task, and processes may make unequal numbers of forward passes in a
            step.
        deepspeed: DeepSpeed's configuration, for its engine; with `rows`, the sequences of a
            micro-step in each process, and `width` of the model for "auto" values.
        config: the resolved configuration.
        quiet_keys: keys of the configuration whose change is not reported on resume.
        start_hint: option that initializes a new run from another run's weights.
        trainer: set when all is restored, before the first step; a task that reads it declares it
            as a `Trainer`.
    """

    name: str
    settings: TrainerSettings
    module: nn.Module
    optimizer: torch.optim.Optimizer
    meter: Meter
    step_batches: StepBatches[Any] | None = None
    first_step: int = 0
    parallel: bool = True
    sample_steps: int = 0
    eval_steps: int = 0
    loss_reduction: Literal["mean", "sum"] = "mean"
    plain_attention: bool = True
    after_step: Callable[[int], None] | None = None
    ddp_options: Mapping[str, bool] = MappingProxyType({"broadcast_buffers": False})
    deepspeed: ConfigNode | None = None
    rows: int
    width: int
    config: ConfigNode | None = None
    quiet_keys: Sequence[str] = ()
    start_hint: str = "`start`"
    trainer: object

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
        """Whether checkpoints have the frozen weights of `module`, too."""
        return self.settings.save_frozen

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

    def loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Metrics]:
        """Loss of one micro-batch by `model` (the engine's `module`), and numbers to log.

        micro_step: step · gradient_accumulation_steps + index in the step. torch's generators are
            seeded from (seed, micro_step, rank) before each call.
        """
        raise NotImplementedError

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
        if self.step_batches is None:
            return {}
        return {
            "wait_seconds": self.step_batches.wait_seconds,
            "bad_samples": self.step_batches.n_bad,
        }

    def finish(self, group: ProcessGroup) -> Mapping[str, object]:
        """Called at the end: save the final weights (first process); returns further values of the
        record."""
        return {}

    def summary(self, record: JsonObject) -> list[str]:
        """Lines of the final summary."""
        return [f"done: {json.dumps(record)}"]

    def identity(self, world: int) -> JsonObject:
        """Values that must be those of the checkpoint when a run resumes."""
        return {}

    def reported(self, world: int) -> JsonObject:
        """Values whose change is logged when a run resumes."""
        return {"processes": world}

    def frozen_models(self) -> Mapping[str, str]:
        """Name -> `fingerprint` of frozen models outside of `module`."""
        return {}

    def state_dict(self) -> JsonObject:
        """State of this process (data position, bad samples), JSON-serializable."""
        return {} if self.step_batches is None else self.step_batches.state_dict()

    def load_state_dict(self, states: list[JsonObject], rank: int) -> None:
        """Restore from the `state_dict`s of all processes, by rank; their number may differ."""
        if self.step_batches is not None:
            self.step_batches.load_state_dict(states)

    def published(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by their names in `module` → those of a checkpoint, by their names in it."""
        return dict(weights)

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write `published` weights (and tokenizer files etc.) into a checkpoint; first process."""
        save_state_dict(weights, folder / WEIGHTS)

    def load(self, folder: Path) -> None:
        """Load a checkpoint into the module. Raises CheckpointError: weights of another model."""
        file = folder / WEIGHTS
        if not file.is_file():
            raise CheckpointError(f"{folder}: contains no {WEIGHTS}.")
        allow_missing = [glob.escape(name) for name in frozen_names(self.module)]
        assign_strictly(self.module, load_state_dict(file), file, allow_missing=allow_missing)


class StageTask(Task):
    """One stage; subclasses define `loss` and override methods of `Task`.

    Args:
        optimizer: by default AdamW on all parameters of `module` with gradients.
        parallel: False if the loss calls submodules of `module` without its `forward`.
    """

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

    def learning_rate(self, step: int) -> float:
        """By `StageSettings`."""
        return learning_rate(step, self.settings)

    def finish(self, group: ProcessGroup) -> Mapping[str, object]:
        """Step size; subclasses add their metrics."""
        values: JsonObject = {"stage": self.name, "batch_size": self.settings.batch_size}
        if self.settings.gradient_accumulation_steps > 1:
            values["accumulate"] = self.settings.gradient_accumulation_steps
        if group.world > 1:
            values["processes"] = group.world
        return values

    def identity(self, world: int) -> JsonObject:
        """The samples per step, which determine the sample order."""
        micro_steps = self.settings.gradient_accumulation_steps
        return {"samples_per_step": self.settings.batch_size * micro_steps * world}


def frozen_names(module: nn.Module) -> list[str]:
    """Names of frozen parameters."""
    parameters = module.named_parameters(remove_duplicate=False)
    return [name for name, parameter in parameters if not parameter.requires_grad]
