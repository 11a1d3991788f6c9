"""Base of the Hydra trainings: settings by groups, engine, schedule, and resume checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import OmegaConf

from seed_multimodal.disk import replace_text, writing
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import check_keys, check_value, read_settings
from seed_multimodal.training.config import OptimSettings
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.engine import resolve_deepspeed_config
from seed_multimodal.training.schedules import optim_learning_rate
from seed_multimodal.training.task import Task, changed_counts, check_unchanged
from seed_multimodal.training.trainer import run_task

# Settings that do not change the training's numbers, or are reported by `RunTask.check_resume`.
QUIET_KEYS = (
    "output_dir",
    "deepspeed",
    "eval_data",
    "data.batch_size",
    "data.held_out",
    "model.compile",
    "model.gradient_checkpointing",
    *(
        f"trainer.{name}"
        for name in (
            "resume",
            "max_steps",
            "logging_steps",
            "save_steps",
            "save_seconds",
            "save_total_limit",
            "async_save",
            "eval_steps",
            "eval_batches",
            "report_to",
            "curves",
            "run_name",
            "dataloader_num_workers",
            "device",
            "timeout_minutes",
            "gradient_accumulation_steps",
            "gradient_checkpointing",
            "compile",
            "save_frozen",
            "sample_steps",
        )
    ),
)
FIXED_ON_RESUME = {
    "engine": "engine",
    "zero_stage": "ZeRO stage",
    "model": "model",
    "optimizer": "optimizer",
    "samples_per_step": "samples per step",
}  # must not change on resume
REPORTED_ON_RESUME = {
    "world_size": "processes",
    "rows_per_step": "rows a step",
    "max_steps": "steps in all (the schedule follows)",
}


@dataclass
class RunSettings:
    """A run's settings by group, and `plain`, the resolved configuration."""

    output_dir: Path
    config: dict[str, Any]
    model: Any
    data: Any
    optim: OptimSettings
    trainer: Any
    deepspeed: dict[str, Any] | None = None
    tokenizer: Path = Path()
    eval_data: Any = None
    visual_encoder: Any = None
    agent: Any = None


class RunTask(Task):
    """A `Task` from a configuration with groups; one run in one process.

    Attributes:
        kinds: dataclass of each required group. optional: further groups.
        readers: custom readers of groups: (mapping, name for errors) → settings.
        rows: per micro-step and process; width: of the model, for DeepSpeed's `auto` values.
    """

    name, record_file, checkpoint_folder, quiet_keys = "train", "summary.json", "", QUIET_KEYS
    group_types: ClassVar[Mapping[str, Any]]
    optional_groups: ClassVar[tuple[str, ...]] = ("deepspeed",)
    group_readers: ClassVar[Mapping[str, Callable[[Mapping[str, Any], str], Any]]] = {}
    rows: int
    width: int

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> RunSettings:
        """Parse a resolved configuration. Raises ConfigError."""
        check_keys(config, ("output_dir", *cls.group_types, *cls.optional_groups), "configuration")
        missing = next(
            (key for key in ("output_dir", *cls.group_types) if config.get(key) in (None, "")), None
        )
        if missing:
            raise ConfigError(f"configuration: {missing} is required.")
        given: dict[str, Any] = {
            key: check_value(dict[str, Any], config[key], f"configuration: {key}")
            for key in (*cls.group_types, *cls.optional_groups)
            if config.get(key) is not None
        }
        for key, value in given.items():
            if key in cls.group_readers:
                given[key] = cls.group_readers[key](value, key)
            elif key in cls.group_types:
                given[key] = read_settings(cls.group_types[key], value, key)
        return RunSettings(Path(str(config["output_dir"])), dict(config), **given)

    @classmethod
    def train(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Train with a resolved configuration; returns the run's record, as `run_task`."""
        return run_task(cls.read(config), cls)

    def __init__(self, run: RunSettings, group: ProcessGroup, device: torch.device) -> None:
        self.run, self.settings, self.group, self.device = run, run.trainer, group, device
        self.config = run.config
        self.zero_stage = int(
            ((run.deepspeed or {}).get("zero_optimization") or {}).get("stage", 0)
        )
        self.learning_rate(self.settings.max_steps - 1)  # raises on invalid schedule options

    def prepare(self) -> None:
        """Write the configuration into the output folder."""
        if self.group.first:
            with writing(self.run.output_dir):
                self.run.output_dir.mkdir(parents=True, exist_ok=True)
                replace_text(
                    self.run.output_dir / "config.yaml",
                    OmegaConf.to_yaml(OmegaConf.create(self.run.config)),
                )

    def deepspeed_config(self, world: int) -> Mapping[str, Any] | None:
        """The configuration's DeepSpeed block, with "auto" resolved."""
        if self.run.deepspeed is None:
            return None
        config, remarks = resolve_deepspeed_config(
            self.run.deepspeed, self.settings, world=world, rows=self.rows, hidden_size=self.width
        )
        self._log(*remarks)
        return config

    def samples_due(self, step: int) -> bool:
        """Whether this process writes samples after a step: the first process, every `sample_steps` or `save_steps`."""
        every = self.settings.sample_steps
        every = self.settings.save_steps or self.settings.max_steps if every is None else every
        return self.group.first and every > 0 and step % every == 0

    def log_sizes(self, what: str) -> None:
        """Log the number of trained parameters, device and output folder."""
        sizes = [
            (getattr(p, "ds_numel", p.numel()), p.requires_grad)
            for p in self.wrapped_module.parameters()
        ]
        trained, total = sum(size for size, used in sizes if used), sum(size for size, _ in sizes)
        self._log(
            f"{what}{trained:,} of {total:,} parameters are trained in {self.settings.precision}, processes: "
            f"{self.group.world} on {self.device.type}; output in {self.run.output_dir}."
        )

    def learning_rate(self, step: int) -> float:
        """By `OptimSettings`."""
        return optim_learning_rate(
            step, self.run.optim, self.settings.max_steps, self.settings.gradient_accumulation_steps
        )

    def identity(self, world: int) -> dict[str, Any]:
        """Engine, optimizer and counts; subclasses add their model and the step size."""
        return {
            "engine": "plain" if self.run.deepspeed is None else "deepspeed",
            "zero_stage": self.zero_stage,
            "optimizer": self.run.optim.name,
            "world_size": world,
            "max_steps": self.settings.max_steps,
        }

    def check_resume(
        self, folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]
    ) -> list[str]:
        """Raise CheckpointError on another engine, model, optimizer or number of samples, and with DeepSpeed another
        number of processes."""
        nouns = FIXED_ON_RESUME | (
            {"world_size": "number of processes"} if self.run.deepspeed is not None else {}
        )
        check_unchanged(
            folder,
            saved,
            now,
            {key: noun for key, noun in nouns.items() if key in now},
            self.start_hint,
        )
        return changed_counts(
            saved, now, {key: noun for key, noun in REPORTED_ON_RESUME.items() if key in now}
        )

    def _log(self, *texts: str) -> None:
        for text in filter(None, texts if self.group.first else ()):
            print(f"[{self.name}] {text}", flush=True)
