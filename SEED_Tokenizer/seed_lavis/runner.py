"""The runner `runner_seed`: LAVIS's runner around the library's restartable loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from seed_lavis.compat import RunnerBase, registry
from seed_lavis.context import RunContext
from seed_lavis.datasets import dataset_ratios, mixed_order, split_of
from seed_lavis.log import log
from seed_lavis.options import RunOptions
from seed_lavis.report import summary
from seed_lavis.resume import prepare_resume
from seed_lavis.task import TokenizerTask, split_losses
from seed_multimodal.data.stream.skip_budget import BadSamples
from seed_multimodal.data.stream.step_batches import StepBatches
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import read_settings
from seed_multimodal.training.trainer import train_stage


@registry.register_runner("runner_seed")
class RunnerSeed(RunnerBase):
    """Trains or evaluates one model; `cfg` is the checked configuration of `run_config.load_config`."""

    def __init__(self, cfg: Any, task: Any, model: Any, datasets: Mapping[str, Any], job_id: str = "") -> None:
        self.options = read_settings(RunOptions, cfg.run_cfg, "run")
        super().__init__(cfg, task, model, datasets, job_id)
        device = torch.device(self.options.device)
        if device.type == "cuda":
            device = torch.device("cuda", cfg.run_cfg.get("gpu", 0))
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.run = RunContext(model, self.options, cfg, Path(self.output_dir), device, rank, world)

    def setup_output_dir(self) -> None:
        """As LAVIS's, but a second run in one process may register its own folders."""
        for name in ("result_dir", "output_dir"):
            registry.mapping["paths"].pop(name, None)
        try:
            super().setup_output_dir()
        except OSError as error:
            raise ConfigError(f"{error.filename or self.options.output_dir}: the folder cannot be made "
                              f"({error.strerror}); choose another run.output_dir.") from error

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.run.device

    @property
    def model(self) -> nn.Module:
        """The model on its device; the loop wraps it for several processes."""
        if self._wrapped_model is None:
            self._wrapped_model = self._model.place(self.device)
        return self._wrapped_model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """LAVIS's, or AdamW on the groups of a model that has its own."""
        if self._optimizer is None and hasattr(self._model, "optimizer_groups"):
            groups = self.model.optimizer_groups(self.options.weight_decay)  # type: ignore[operator]
            self._optimizer = torch.optim.AdamW(groups, lr=self.options.init_lr, betas=(0.9, self.options.beta2))
        return super().optimizer

    @property
    def scaler(self) -> None:
        """The loop has its own; LAVIS's would need CUDA."""
        return None

    def train(self) -> dict[str, Any]:
        """Train to the end, from the newest checkpoint in the output folder if there is one; returns the record."""
        options, data = self.options, split_of(self.datasets, self.options.train_splits)
        for split in options.valid_splits:
            split_of(self.datasets, [split])  # refused now, not after the first epoch
        _ = self.model  # on its device now
        ratios = dataset_ratios(self.config.datasets_cfg, options.train_dataset_ratios)
        # Data workers ignore SIGTERM, as the loop does during a step; the end of `with` stops them.
        with StepBatches(data, options.batch_size_train, seed=options.seed, rank=self.run.rank, world=self.run.world,
                         workers=options.num_workers,
                         order=mixed_order(self.datasets, options.train_splits, ratios, options.seed)) as self.batches:
            task = TokenizerTask(self.run, self, self.batches, data if isinstance(data, BadSamples) else None)
            prepare_resume(self.run, task)
            record = train_stage(task, self.run.folder)
        for line in summary(self.run, record):
            log(line)
        return record

    def evaluate(self, cur_epoch: str | int = "best", skip_reload: bool = False) -> dict[str, dict[str, float]]:
        """Mean losses over each of `run.test_splits`, one process; stage 2 also reports its codes."""
        if self.run.world > 1:
            raise ConfigError("Evaluation runs as one process.")
        if not self.options.test_splits:
            raise ConfigError("run.test_splits names no split to evaluate: give --options run.test_splits=[val].")
        self._model.place(self.device)
        return {split: split_losses(self.run, self.datasets, split) for split in self.options.test_splits}
