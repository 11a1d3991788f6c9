"""Settings of the trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from seed_multimodal.settings import setting

PRECISIONS = ("bf16", "fp16", "fp32")
WAIT_MINUTES = 30.0  # for a process that does not answer: default of `timeout_minutes` everywhere


@dataclass(kw_only=True)
class LoopSettings:
    """Settings of the loop; `steps` counts optimiser steps of `accumulate` micro-steps in each process.

    Attributes:
        precision: what products are computed in; trained weights are kept in fp32 beside it.
        clip: the largest gradient norm (0: measured, not clipped).
        ema: decay of the averaged weights, which are the result (0: none).
        save_seconds, save_every_steps: when a checkpoint is due (0: not by that), beside the one at the end.
        keep: checkpoints kept, the newest first; None deletes nothing.
        async_save: write checkpoints beside the training (not with DeepSpeed).
        save_frozen: whether checkpoints hold parameters that are not trained, too. Without, the caller builds them
            again, from the same files, before a resume.
        resume: `auto` (from the newest complete checkpoint of the folder), `never`, or a checkpoint's folder.
        start: a checkpoint, or a folder of them, whose weights (not the optimiser) the first step starts from.
        curves: draw `curves.png` from the log at the end.
        further: a completed run continues if it is asked for more steps.
        timeout_minutes: how long a step, and any exchange, waits for another process; 0 waits for ever.
    """

    steps: int = setting(1000, least=0)
    accumulate: int = setting(1, least=1)
    precision: str = setting("bf16", choices=PRECISIONS)
    clip: float = setting(1.0, least=0, most=math.inf)
    ema: float = setting(0.0, least=0, below=1)
    seed: int = setting(0, least=0)
    log_every: int = setting(50, least=1)
    save_seconds: float = setting(60.0, least=0, most=math.inf)
    save_every_steps: int = setting(0, least=0)
    save_frozen: bool = True
    keep: int | None = setting(1, least=1)
    async_save: bool = False
    resume: str = "auto"
    start: str = ""
    tensorboard: bool = False
    wandb: bool = False
    run_name: str | None = None
    curves: bool = True
    further: bool = False
    timeout_minutes: float = setting(WAIT_MINUTES, least=0)


@dataclass(kw_only=True)
class StageSettings(LoopSettings):
    """Settings of one stage whose optimiser and schedule are the usual ones; a step takes `batch_size · accumulate ·
    processes` samples, and the rate rises for `warmup` steps to `lr` and falls to `lr · min_lr_ratio`, along a cosine
    or another of `schedules.KINDS` (`lr_scheduler_type`, with transformers' options in `lr_scheduler_kwargs`)."""

    steps: int = setting(least=0)
    batch_size: int = setting(64, least=1)
    lr: float = setting(1e-3, least=0)
    warmup: int = setting(100, least=0)
    min_lr_ratio: float = setting(0.02, least=0)
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: dict[str, Any] = setting(factory=dict)
    weight_decay: float = setting(0.01, least=0)


def stage(steps: int, batch: int, lr: float, **more: Any) -> Any:
    """A field of settings: a stage of that length; `more`: other values of `StageSettings`."""
    return field(default_factory=lambda: StageSettings(steps=steps, batch_size=batch, lr=lr, **more))
