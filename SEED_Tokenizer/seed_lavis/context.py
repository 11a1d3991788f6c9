"""The context of one training run: its model, options, folder and processes, in one frozen object for all parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seed_lavis.options import RunOptions
from seed_multimodal.training.config import StageSettings


@dataclass(frozen=True)
class RunContext:
    """Made by the runner.

    Attributes:
        model: one of ours, not wrapped; its `stage` names the run's files.
        config: LAVIS's `Config`, checked; options: its section `run`.
        folder: the output folder; rank, world: of this process.
    """

    model: Any
    options: RunOptions
    config: Any
    folder: Path
    device: torch.device
    rank: int
    world: int

    @property
    def stage(self) -> str:
        """Name of the run's files: stage1, stage2 or seed1-stage2."""
        return str(self.model.stage)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch, which has `iters_per_epoch` iterations (micro-steps)."""
        return self.options.iters_per_epoch // self.options.accum_grad_iters

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps_per_epoch * self.options.max_epoch

    @property
    def last_checkpoint(self) -> Path:
        """LAVIS's checkpoint of the last epoch."""
        return self.folder / f"checkpoint_{self.options.max_epoch - 1}.pth"

    @property
    def precision(self) -> str:
        """`run.precision`, or what `run.amp` means on this device: bf16 or fp16 on a GPU, fp32 elsewhere."""
        if self.options.precision != "auto":
            return self.options.precision
        if not self.options.amp or self.device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"

    def settings(self) -> StageSettings:
        """What the library's loop reads."""
        run = self.options
        return StageSettings(
            steps=self.steps, batch_size=run.batch_size_train, lr=run.init_lr, weight_decay=run.weight_decay,
            clip=run.clip_grad, ema=run.ema, precision=self.precision, seed=run.seed, save_seconds=run.save_seconds,
            log_every=run.log_freq, accumulate=run.accum_grad_iters, save_every_steps=run.save_every_steps,
            save_frozen=False, tensorboard=run.tensorboard, further=True, timeout_minutes=run.timeout_minutes)
