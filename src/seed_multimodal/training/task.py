"""The contract of trainer and task, and the usual task: a module and a loss per batch."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

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
from seed_multimodal.training.meters import Meter, Metrics
from seed_multimodal.training.optimizers import stage_optimizer
from seed_multimodal.training.schedules import learning_rate

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

WEIGHTS = "model.safetensors"
ONE_PROCESS = None  # as `Task.ddp_options`


@dataclass(frozen=True, kw_only=True)
class RunView:
    """What a task sees of the run that trains it.

    Attributes:
        step: completed steps.
        model: `Engine.model`, whose forward passes are collective: the task's module, in
            DistributedDataParallel or DeepSpeed's engine if the run has one.
        autocast: context in the run's precision.
        weights: as `Engine.weights`.
        stop_requested: whether a process received SIGTERM or Ctrl-C; collective. Long evaluations
            call it to end early.
        evaluation: numbers of the latest evaluation, with its `step`.
        checkpoint: folder of the last one.
        board: TensorBoard's, in the first process.
    """

    step: int
    group: ProcessGroup
    model: nn.Module
    autocast: Callable[[], AbstractContextManager[object]]
    weights: Callable[[], Mapping[str, Tensor]]
    stop_requested: Callable[[], bool]
    evaluation: Mapping[str, float]
    checkpoint: Path | None
    board: SummaryWriter | None


class Part(Protocol):
    """A part of a task with a state of its own in each process: its data, its codebook."""

    def status(self) -> Mapping[str, float]:
        """Numbers of a log line.

        Counts (int) are summed over processes and parts, and also in the run's record; measures
        (float) of a name are of one part, and averaged over processes. `wait_seconds` is all time
        spent waiting for data, summed over parts and logged as `wait_share`.
        """

    def state_dict(self) -> JsonObject:
        """State of this process, JSON-serializable."""

    def load_state_dict(self, states: Sequence[JsonObject]) -> None:
        """Restore from the states of all processes, by rank; their number may differ."""


class Identity(NamedTuple):
    """Values that are compared when a run resumes.

    fixed: must be those of the checkpoint. reported: their change is logged.
    """

    fixed: JsonObject
    reported: JsonObject


class Task:
    """Everything that differs between trainings; methods are called by the trainer.

    Attributes:
        name: prefix of console lines and of the files NAME.log.jsonl and NAME.done.json.
        settings: of the trainer.
        module: the trained and saved module.
        optimizer: of (some of) the module's parameters.
        meter: aggregates numbers of steps into log lines.
        parts: what has a state besides these.
        learning_rate: rate of an optimizer step (from 0); multiplied by a group's `lr_scale`.
        peak_rate: the highest one of the schedule.
        after_step: called after each optimizer step, before the weights are averaged, with the
            number of completed ones; may change weights if equally in all processes.
        record_file, checkpoint_folder: name of the completed run's record, and of the checkpoints'
            folder ("": the run's itself).
        sample_steps, eval_steps: steps between samples and between evaluations (0: none); there is
            also an evaluation at the end.
        plain_attention: on a CPU attention uses plain matrix products, since the backward pass of
            the fused bf16 kernel is several times slower.
        ddp_options: of DistributedDataParallel; `ONE_PROCESS`: several cannot train it. Buffers are
            not broadcast: they are constants or kept equal by the task, and processes may make
            unequal numbers of forward passes in a step.
        deepspeed: DeepSpeed's configuration, for its engine.
        saves_frozen: whether checkpoints have the frozen weights of `module`, too.
        frozen_models: name → `fingerprint` of frozen models outside of `module`.
        config: the resolved configuration.
        quiet_keys: keys of the configuration whose change is not reported on resume.
        start_hint: option that initializes a new run from another run's weights.
    """

    name: str
    settings: TrainerSettings
    module: nn.Module
    optimizer: torch.optim.Optimizer
    meter: Meter
    parts: Sequence[Part] = ()
    learning_rate: Callable[[int], float]
    peak_rate: float
    after_step: Callable[[int], None] | None = None
    record_file: str
    checkpoint_folder: str
    sample_steps: int = 0
    eval_steps: int = 0
    plain_attention: bool = True
    ddp_options: Mapping[str, bool] | None = MappingProxyType({"broadcast_buffers": False})
    deepspeed: ConfigNode | None = None
    saves_frozen: bool
    frozen_models: Mapping[str, str] = MappingProxyType({})
    config: ConfigNode | None = None
    quiet_keys: Sequence[str] = ()
    start_hint: str = "`start`"

    # ---- training

    def prepare(self) -> None:
        """Build `module` and `optimizer`; called after `identity` was compared."""

    def batches(self, step: int) -> Sequence[Any]:
        """This process's micro-batches of a step: `gradient_accumulation_steps`, fewer at the end
        of the data."""
        raise NotImplementedError

    def weight(self, batch: Any) -> float:
        """What the `loss` of a batch counts in its step."""
        return 1.0

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Metrics]:
        """Loss of a micro-batch by `model` (`RunView.model`), and numbers to log.

        All are sums of what `weight` counts: a step's are the sums over its micro-batches in all
        processes, divided by the sum of the weights. In a step, all processes return numbers of
        the same names, none of which is among the meter's `reserved`.

        torch's generators are seeded from (seed, step, index in the step, rank): for the first
        micro-batch before `batches`, for others before the call.

        batch: of `batches`; None: this process has fewer than others, and returns a loss of 0 that
            is computed by `model` (DistributedDataParallel needs its backward pass) and the same
            numbers as of a batch.
        """
        raise NotImplementedError

    # ---- results

    def write_samples(self, run: RunView) -> None:
        """Called in the first process alone when samples are due; nothing in it is collective, such
        as `run.stop_requested`. Weights and modes as in `evaluate`."""

    def evaluate(self, run: RunView) -> Mapping[str, float]:
        """Evaluation numbers to log; called in all processes, with the averaged weights if the run
        averages, in eval mode and without gradients.

        The time of the call does not count in the speed.
        """
        return {}

    def finish(self, run: RunView) -> Mapping[str, object]:
        """Called at the end: save the final weights (first process); returns further values of the
        record."""
        return {}

    # ---- checkpoints

    def identity(self, world: int) -> Identity:
        """What is compared when a run of `world` processes resumes."""
        return Identity({}, {"processes": world})

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
    """One stage; subclasses define `batch` and `loss`, and override methods of `Task`.

    Args:
        optimizer: by default that of the settings, on all parameters of `module` with gradients.
    """

    settings: StageSettings

    def __init__(
        self,
        name: str,
        module: nn.Module,
        settings: StageSettings,
        *,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        check_settings(settings, f"[{name}]")
        check_schedule(settings, f"[{name}]")
        self.name = name
        self.record_file = f"{name}.done.json"
        self.checkpoint_folder = f"{name}.checkpoints"
        self.module = module
        self.settings = settings
        self.learning_rate = partial(learning_rate, settings=settings)
        self.peak_rate = settings.learning_rate
        self.saves_frozen = settings.save_frozen
        self.optimizer = optimizer or stage_optimizer(module, settings)
        self.meter = Meter(settings.batch_size * settings.gradient_accumulation_steps)

    def batch(self, micro_step: int) -> Any:
        """This process's batch of a micro-step: step · gradient_accumulation_steps + index."""
        raise NotImplementedError

    def batches(self, step: int) -> Sequence[Any]:
        count = self.settings.gradient_accumulation_steps
        return [self.batch(step * count + index) for index in range(count)]

    def finish(self, run: RunView) -> Mapping[str, object]:
        """Step size; subclasses add their metrics."""
        values: JsonObject = {"stage": self.name, "batch_size": self.settings.batch_size}
        if self.settings.gradient_accumulation_steps > 1:
            values["accumulate"] = self.settings.gradient_accumulation_steps
        if run.group.world > 1:
            values["processes"] = run.group.world
        return values

    def identity(self, world: int) -> Identity:
        """The samples per step, which determine the sample order."""
        identity = super().identity(world)
        micro_steps = self.settings.gradient_accumulation_steps
        identity.fixed["samples_per_step"] = self.settings.batch_size * micro_steps * world
        return identity


def frozen_names(module: nn.Module) -> list[str]:
    """Names of frozen parameters."""
    parameters = module.named_parameters(remove_duplicate=False)
    return [name for name, parameter in parameters if not parameter.requires_grad]
