"""Base of the Hydra trainings: settings by groups, engine, schedule, and resume checks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, get_type_hints

import torch
from omegaconf import OmegaConf

from seed_multimodal.config import read_table
from seed_multimodal.disk import JsonObject, replace_text, strict_json, writing
from seed_multimodal.errors import ConfigError
from seed_multimodal.progress import quiet_libraries
from seed_multimodal.settings import check_keys, check_value
from seed_multimodal.training.agreement import agree
from seed_multimodal.training.config import ConfigNode, OptimSettings, RunTrainerSettings
from seed_multimodal.training.distributed import (
    ProcessGroup,
    join_processes,
    process_group_cleanup,
    translate_errors,
)
from seed_multimodal.training.schedules import optim_learning_rate, peak_rate
from seed_multimodal.training.task import Identity, Task
from seed_multimodal.training.trainer import train
from seed_multimodal.training.zero_engine import resolve_deepspeed_config


@dataclass(kw_only=True)
class RunSettings:
    """A run's settings. Fields other than `output_dir` and `config` are groups of the
    configuration, optional if they have a default.

    config: the resolved configuration that they were read from.
    readers: custom readers of groups: (mapping, name for errors) → settings.
    """

    readers: ClassVar[Mapping[str, Callable[[ConfigNode, str], object]]] = MappingProxyType({})

    output_dir: Path
    config: ConfigNode
    model: object
    data: object
    optim: OptimSettings
    trainer: RunTrainerSettings
    deepspeed: ConfigNode | None = None

    @classmethod
    def groups(cls) -> dict[str, tuple[Any, bool]]:
        """Group → its type, and whether it is required."""
        types = get_type_hints(cls)
        return {
            item.name: (types[item.name], item.default is MISSING)
            for item in fields(cls)
            if item.name not in ("output_dir", "config")
        }

    @classmethod
    def read(cls, config: ConfigNode) -> Self:
        """Parse a resolved configuration. Raises ConfigError."""
        groups = cls.groups()
        required = [name for name, (_, is_required) in groups.items() if is_required]
        check_keys(config, ("output_dir", *groups), "configuration")
        for key in ("output_dir", *required):
            if config.get(key) in (None, ""):
                raise ConfigError(f"configuration: {key} is required.")

        # All groups are mappings; check that before any of them is read.
        settings: JsonObject = {}
        for key in groups:
            if config.get(key) is not None:
                settings[key] = check_value(dict[str, Any], config[key], f"configuration: {key}")
        for key, values in settings.items():
            if key in cls.readers:
                settings[key] = cls.readers[key](values, key)
            else:
                settings[key] = check_value(groups[key][0], values, key)
        return cls(output_dir=Path(str(config["output_dir"])), config=config, **settings)


class RunTask(Task):
    """A `Task` from a configuration with groups; one run in one process.

    Attributes:
        run_type: groups of the configuration.
    """

    name = "train"
    record_file = "summary.json"
    checkpoint_folder = ""
    quiet_keys: Sequence[str] = read_table(__file__)
    settings: RunTrainerSettings
    rows: int  # sequences of a micro-step in each process
    width: int  # of the model
    run_type: ClassVar[type[RunSettings]]

    @classmethod
    def train(cls, config: ConfigNode) -> JsonObject:
        """Train with a resolved configuration; under torchrun every process calls it.

        Returns the run's record, also written to `output_dir/summary.json`.
        """
        run = cls.run_type.read(config)
        quiet_libraries()
        with process_group_cleanup():
            # Join the other processes, and open the data.
            with translate_errors("the start", lambda: "nothing was trained yet"):
                timeout_minutes = run.trainer.timeout_minutes
                device = join_processes(
                    run.trainer.device,
                    timeout_minutes,
                    single_process_group=run.deepspeed is not None,
                )
                group = ProcessGroup(timeout_minutes)
                agree(group, config, run.output_dir)
                task = cls(run, group, device)
            with contextlib.closing(task):
                record = train(task, run.output_dir, group=group, device=device)
            group.log(cls.name, *task.summary(record))
            return record

    def __init__(self, run: RunSettings, group: ProcessGroup, device: torch.device) -> None:
        self.run = run
        self.settings = run.trainer
        self.sample_steps = self.settings.save_steps or self.settings.max_steps
        if self.settings.sample_steps is not None:
            self.sample_steps = self.settings.sample_steps
        self.group = group
        self.device = device
        self.config = run.config
        self.learning_rate = partial(
            optim_learning_rate,
            settings=run.optim,
            max_steps=self.settings.max_steps,
            micro_batches=self.settings.gradient_accumulation_steps,
        )
        self.peak_rate = peak_rate(run.optim)
        self.saves_frozen = self.settings.save_frozen
        self.zero_stage = 0
        if run.deepspeed is not None:
            zero = run.deepspeed.get("zero_optimization") or {}
            self.zero_stage = int(zero.get("stage", 0))

    @cached_property
    def deepspeed(self) -> ConfigNode | None:  # type: ignore[override]
        """The run's, resolved when the model is built."""
        if self.run.deepspeed is None:
            return None
        config, remarks = resolve_deepspeed_config(
            self.run.deepspeed,
            self.settings,
            world=self.group.world,
            rows=self.rows,
            hidden_size=self.width,
        )
        self._log(*remarks)
        return config

    def prepare(self) -> None:
        """Write the configuration into the output folder."""
        if self.group.first:
            output_dir = self.run.output_dir
            with writing(output_dir):
                output_dir.mkdir(parents=True, exist_ok=True)
                text = OmegaConf.to_yaml(OmegaConf.create(dict(self.run.config)))
                replace_text(output_dir / "config.yaml", text)

    def close(self) -> None:
        """Close the data; called at the end of the run, also after an error."""

    def summary(self, record: JsonObject) -> list[str]:
        """The last lines of a run."""
        return [f"done: {strict_json(record)}"]

    def log_sizes(self, title: str) -> None:
        """Log the number of trained parameters, device and output folder, after a title."""
        parameters = list(self.module.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in parameters)
        self._log(
            f"{title}{trained:,} of {total:,} parameters are trained in {self.settings.precision}, "
            f"processes: {self.group.world} on {self.device.type}; output in {self.run.output_dir}."
        )

    def identity(self, world: int) -> Identity:
        """Engine and optimizer; subclasses add their model and the step size.

        Reported are counts that the schedule and the sample order follow.
        """
        identity = super().identity(world)
        identity.reported["max_steps"] = self.settings.max_steps
        identity.fixed["engine"] = "plain"
        identity.fixed["zero_stage"] = self.zero_stage
        identity.fixed["optimizer"] = self.run.optim.name
        if self.run.deepspeed is not None:
            identity.fixed["engine"] = "deepspeed"
        return identity

    def _log(self, *texts: str) -> None:
        """As `ProcessGroup.log`."""
        self.group.log(self.name, *texts)
