"""The interface between the loop and what it trains: module, optimiser, loss per micro-step, files of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from seed_multimodal.errors import CheckpointError
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.meter import Meter
from seed_multimodal.weights import load_state_dict, save_state_dict

WEIGHTS = "model.safetensors"


class Task:
    """One training: everything that differs between trainings. The loop calls these methods.

    Attributes:
        name: prefix of console lines and of the files NAME.log.jsonl and NAME.done.json.
        module: everything that is trained and saved; optimizer: trains (some of) its parameters.
        meter: how the numbers of steps become a log line.
        first_step: steps of an earlier run, of another format, whose weights and optimiser the task holds already.
        parallel: whether several processes may train it.
        averages: the loss of a step is the mean of its micro-steps' losses; else their sum.
        ddp_options: options of DistributedDataParallel.
        layer_classes: names of the layers' classes that FSDP2 takes as units.
        config: the resolved configuration; `quiet_keys`: keys whose change is not reported at a resume.
    """

    name: str
    module: nn.Module
    optimizer: Any
    meter: Meter
    first_step: int = 0
    parallel: bool = True
    averages: bool = True
    ddp_options: Mapping[str, Any] = {}
    layer_classes: Sequence[str] = ()
    config: Mapping[str, Any] | None = None
    quiet_keys: Sequence[str] = ()
    start_hint: str = "`start`"  # how a new run takes the weights of another

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

    # ------------------------------------------------------------------------------------------------- the training

    def prepare(self) -> None:
        """Build `module` and `optimizer`; called when it is certain that the run may begin or resume."""

    def deepspeed_config(self, world: int) -> Mapping[str, Any] | None:
        """A configuration of `zero.fill_config`, if the engine is to be DeepSpeed's; called after `prepare`."""
        return None

    def prepared(self, run: Any) -> None:
        """Called once everything is restored, before the first step; `run` is the `loop.Run`, with its engine and
        log."""

    def learning_rate(self, step: int) -> float:
        """Rate of optimiser step `step` (from 0); times a group's `lr_scale` if it has one."""
        raise NotImplementedError

    def begin_step(self, step: int) -> bool:
        """Before the first micro-step of a step, in every process; False: the data of all processes have ended."""
        return True

    def micro_step(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """Loss of micro-step `step · accumulate + m`, and numbers to log (floats or scalar tensors).

        Args:
            model: `wrapped_part` as the engine has it; backward passes go through it. torch's generators are seeded
                from (seed, micro-step, rank) before every call.
        """
        raise NotImplementedError

    def after_step(self, step: int) -> Mapping[str, float] | None:
        """After each optimiser step, with the number of steps made, in every process; may change weights if it leaves
        all processes' equal. Numbers (of an evaluation: the same keys in every process) are logged at once, and the
        time of a call that returns some is left out of the speed."""
        return None

    def acts_after(self, step: int) -> bool:
        """Whether `after_step` of this step does anything. Until it does, and between log lines and checkpoints, the
        numbers of steps stay on the device, unchecked, so that no step waits for them."""
        return True

    def after_last_step(self, step: int) -> Mapping[str, float] | None:
        """As `after_step`, once, after the last step of a run that was not stopped."""
        return None

    def status(self) -> Mapping[str, float]:
        """More numbers of a log line: counts (int, summed over processes), measures (float, averaged)
        and `wait_seconds` (all time spent waiting for data; logged as `wait_share`)."""
        return {}

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        """At the end, in every process: save the final weights (the first process only); returns what the record holds
        beside steps and seconds, in which only the first process's answer counts."""
        return {}

    def summary(self, record: Mapping[str, Any]) -> list[str]:
        """Lines that summarise the run at its end."""
        return [f"done: {json.dumps(record)}"]

    # ---------------------------------------------------------------------------------------------- the checkpoints

    def identity(self, world: int) -> dict[str, Any]:
        """What trainer_state.json records of the run, for `check_resume`."""
        return {"world_size": world}

    def frozen_models(self) -> Mapping[str, list[float]]:
        """By name `some_weights` of the frozen models from which a step's numbers come and that `module` does not hold;
        asked after `prepare`."""
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
        """What a checkpoint holds of the module.

        Args:
            gathered: trained weights of `wrapped_part`, collected by an engine that spreads them.
        """
        return dict(self.module.state_dict() if gathered is None else gathered)

    def save_files(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the weights (and tokenizer files and the like) into a checkpoint; the first process."""
        save_state_dict(weights, folder / WEIGHTS)

    def load_weights(self, folder: Path, allow_missing: Sequence[str] = ()) -> None:
        """Fill the module from a checkpoint before an engine takes it.

        Raises:
            CheckpointError: weights of another model.
        """
        from seed_multimodal.weights import assign_strictly

        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder}: holds no {WEIGHTS}.")
        assign_strictly(self.module, load_state_dict(folder / WEIGHTS), folder / WEIGHTS,
                        allow_missing=list(allow_missing))
