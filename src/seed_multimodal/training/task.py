"""What is trained: the interface of the trainer to a task, and the usual task, a module and a loss of each batch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from seed_multimodal.errors import CheckpointError
from seed_multimodal.settings import check_settings
from seed_multimodal.training.config import StageConfig
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.metrics import Meter
from seed_multimodal.training.optimizers import parameter_groups
from seed_multimodal.training.schedules import learning_rate
from seed_multimodal.weights import assign_strictly, load_state_dict, save_state_dict

WEIGHTS = "model.safetensors"


class Task:
    """One training: everything that differs between trainings. The trainer calls these methods.

    Attributes:
        name: prefix of console lines and of the files NAME.log.jsonl and NAME.done.json.
        module: everything that is trained and saved; optimizer: trains (some of) its parameters.
        meter: how the numbers of steps become a log line.
        first_step: steps of an earlier run, of another format, whose weights and optimiser the task holds already.
        parallel: whether several processes may train it; ddp_options: of DistributedDataParallel.
        averages: the loss of a step is the mean of its micro-steps' losses; else their sum.
        config: the resolved configuration; `quiet_keys`: keys whose change is not reported at a resume.
        start_hint: how a new run takes the weights of another.
    """

    name: str
    module: nn.Module
    optimizer: Any
    meter: Meter
    first_step: int = 0
    parallel: bool = True
    averages: bool = True
    ddp_options: Mapping[str, Any] = {}
    config: Mapping[str, Any] | None = None
    quiet_keys: Sequence[str] = ()
    start_hint: str = "`start`"

    @property
    def wrapped_part(self) -> nn.Module:
        """What the engine wraps and `micro_step` calls."""
        return self.module

    @property
    def record_file(self) -> str:
        """Name of the completed run's record."""
        return f"{self.name}.done.json"

    @property
    def checkpoint_folder(self) -> str:
        """Where in the run's folder the checkpoints are ("": in the folder itself)."""
        return f"{self.name}.checkpoints"

    def prepare(self) -> None:
        """Build `module` and `optimizer`; called when it is certain that the run may begin or resume."""

    def deepspeed_config(self, world: int) -> Mapping[str, Any] | None:
        """What `engine.fill_config` gave, if the engine is to be DeepSpeed's; called after `prepare`."""
        return None

    def prepared(self, run: Any) -> None:
        """Called with the `Trainer` once everything is restored, before the first step."""

    def learning_rate(self, step: int) -> float:
        """Rate of optimiser step `step` (from 0); times a group's `lr_scale` if it has one."""
        raise NotImplementedError

    def begin_step(self, step: int) -> bool:
        """Before the first micro-step of a step, in every process; False: the data of all processes have ended."""
        return True

    def micro_step(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """Loss of micro-step `step · gradient_accumulation_steps + m` by `model` (`wrapped_part` as the engine has it),
        and numbers to log. torch's generators are seeded from (seed, micro-step, rank) before every call."""
        raise NotImplementedError

    def after_step(self, step: int) -> Mapping[str, float] | None:
        """After each optimiser step, with the number of steps made, in every process; may change weights if it leaves
        all processes' equal. Numbers (of an evaluation) are logged, and the time of the call is left out of the speed.
        """
        return None

    def after_last_step(self, step: int) -> Mapping[str, float] | None:
        """As `after_step`, once, after the last step of a run that was not stopped."""
        return None

    def status(self) -> Mapping[str, float]:
        """More numbers of a log line: counts (int, summed over processes), measures (float, averaged)
        and `wait_seconds` (all time spent waiting for data; logged as `wait_share`)."""
        return {}

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        """At the end, in every process: save the final weights (the first process only); returns more of the record."""
        return {}

    def summary(self, record: Mapping[str, Any]) -> list[str]:
        """Lines that summarise the run at its end."""
        return [f"done: {json.dumps(record)}"]

    def identity(self, world: int) -> dict[str, Any]:
        """What trainer_state.json records of the run, for `check_resume`."""
        return {"world_size": world}

    def frozen_models(self) -> Mapping[str, Sequence[float]]:
        """By name `some_weights` of the frozen models that a step uses and `module` does not hold."""
        return {}

    def check_resume(self, folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        """Refuse a checkpoint that this run cannot resume from; returns remarks on permitted differences."""
        return []

    def state_dict(self, step: int) -> dict[str, Any]:
        """State of this process alone (position in the data, bad samples), JSON-able."""
        return {}

    def load_state_dict(self, states: list[dict[str, Any]], rank: int) -> None:
        """Restore from the `state_dict`s of all processes, in the order of ranks."""

    def weights(self, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What a checkpoint holds of the module; `gathered`: trained weights of `wrapped_part`, of a sharded engine."""
        return dict(self.module.state_dict() if gathered is None else gathered)

    def save_files(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the weights (and tokenizer files and the like) into a checkpoint; the first process."""
        save_state_dict(weights, folder / WEIGHTS)

    def load_weights(self, folder: Path, allow_missing: Sequence[str] = ()) -> None:
        """Fill the module from a checkpoint. Raises CheckpointError: weights of another model."""
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder}: holds no {WEIGHTS}.")
        assign_strictly(self.module, load_state_dict(folder / WEIGHTS), folder / WEIGHTS,
                        allow_missing=list(allow_missing))


class StageTask(Task):
    """One stage; a subclass has `step_loss`, and overrides the methods of `Task` in which it differs.

    Args:
        optimizer: by default AdamW on all parameters of `module` that need gradients.
        parallel: False if the loss calls parts of `module` past its `forward`.
    """

    def __init__(self, name: str, module: nn.Module, settings: StageConfig, *, optimizer: Any = None,
                 parallel: bool = True) -> None:
        check_settings(settings, f"[{name}]")
        self.name, self.module, self.settings, self.parallel = name, module, settings, parallel
        self.optimizer = optimizer or torch.optim.AdamW(
            parameter_groups(module, settings.weight_decay), lr=settings.learning_rate, betas=(0.9, 0.99))
        self.meter = Meter(settings.batch_size * settings.gradient_accumulation_steps)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """As `micro_step`."""
        raise NotImplementedError

    def learning_rate(self, step: int) -> float:
        """By `StageConfig`."""
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
        shared = {"accumulate": self.settings.gradient_accumulation_steps, "processes": group.world}
        return {"stage": self.name, "batch_size": self.settings.batch_size,
                **{key: count for key, count in shared.items() if count > 1}}

    def identity(self, world: int) -> dict[str, Any]:
        """Processes, and samples of a step over all of them, from which their order follows."""
        return {"processes": world,
                "samples_per_step": self.settings.batch_size * self.settings.gradient_accumulation_steps * world}

    def check_resume(self, folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        """Refuse another number of samples per step; other processes share them out in another way."""
        refuse_other(folder, saved, now, {"samples_per_step": "samples per step"}, self.start_hint)
        return other_numbers(saved, now, {"processes": "processes"})


def refuse_other(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any], names: Mapping[str, str],
                 instead: str) -> None:
    """Refuse a checkpoint of another engine, model, optimiser or number of samples (`names`: key → noun); `instead`:
    how a new run takes only the weights. Raises CheckpointError: they differ."""
    for key, noun in names.items():
        if saved.get(key) != now[key]:
            before, present = (json.dumps(value)[:200] for value in (saved.get(key), now[key]))
            raise CheckpointError(f"{folder}: was saved by a run with {before} as its {noun}, this one has {present}, "
                                  f"so it would not continue with the same numbers; use the same, or take only its "
                                  f"weights ({instead}) in a new folder.")


def other_numbers(saved: Mapping[str, Any], now: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """A remark without full stop on each of the counts (`names`: key → noun) that differs from the checkpoint's."""
    return [f"the checkpoint was saved with {saved.get(key)} {noun}, this run has {now[key]}"
            for key, noun in names.items() if saved.get(key) != now[key]]
