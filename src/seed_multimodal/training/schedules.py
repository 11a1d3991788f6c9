"""Learning rates as pure functions of the step, for exact resuming, and the seeded sample order."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.stream.sampler import EpochOrder
from seed_multimodal.training.config import OptimSettings, StageSettings


def learning_rate(step: int, settings: StageSettings) -> float:
    """Rate of a stage's step (0-based).

    Linear warm-up from above 0, then by default cosine decay from `learning_rate` to `learning_rate
    · min_lr_ratio` at the last step.
    """
    peak = settings.learning_rate
    warmup = settings.warmup_steps
    floor = settings.min_lr_ratio
    if settings.lr_scheduler_type != "cosine":
        # One step later, since `scheduled_rate` warms up from a rate of 0.
        return scheduled_rate(
            settings.lr_scheduler_type,
            step + 1,
            peak,
            settings.max_steps,
            warmup=warmup,
            floor=floor,
        )
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.max_steps - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return peak * (floor + (1.0 - floor) * cosine)


def peak_rate(settings: OptimSettings) -> float:
    """The schedule's highest rate: `learning_rate`, or if it is 0 the largest of `part_rates`."""
    return settings.learning_rate or max(settings.part_rates.values(), default=0.0)


def optim_learning_rate(
    step: int, settings: OptimSettings, max_steps: int, micro_batches: int = 1
) -> float:
    """Learning rate of optimizer step `step` (0-based) of `max_steps`, of `micro_batches` each."""
    warmup = warmup_count(max_steps, settings.warmup_ratio, settings.warmup_steps)
    return scheduled_rate(
        settings.lr_scheduler_type,
        step,
        peak_rate(settings),
        max_steps,
        floor=settings.min_lr_ratio,
        warmup=warmup,
        clamp=not settings.schedule_per_micro_batch,
        micro_batches=micro_batches if settings.schedule_per_micro_batch else 1,
    )


def warmup_count(max_steps: int, ratio: float = 0.0, steps: int = 0) -> int:
    """Warm-up steps as transformers computes them, in floats: 7 % of 50,000 steps are 3501."""
    return steps if steps > 0 else math.ceil(max_steps * ratio)


def scheduled_rate(
    kind: str,
    step: int,
    lr: float,
    max_steps: int,
    *,
    warmup: int = 0,
    floor: float = 0.0,
    micro_batches: int = 1,
    clamp: bool = True,
) -> float:
    """The language models' schedules: linear warm-up from 0, then `kind`, down to `lr · floor` at
    `max_steps`.

    Source: AILab-CVC/SEED `MultiModalLLM/src/train/optimization.py`.

    Args:
        step: optimizer step from 0; with warm-up the first has a rate of 0.
        micro_batches: SEED-X's loop advances its schedule per micro-batch; a step uses the rate of
            its last one.
        clamp: keep the final rate beyond `max_steps`; the original schedules rise again along the
            cosine.
    """
    if kind == "constant":
        return lr

    # Warm-up.
    schedule_step = micro_batches * (step + 1) - 1
    if schedule_step < warmup:
        return lr * schedule_step / max(1, warmup)
    if kind == "constant_with_warmup":
        return lr

    # Decay; progress is 1 at `max_steps`.
    progress = (schedule_step - warmup) / max(1, max_steps - warmup)
    if clamp:
        progress = min(1.0, progress)
    if kind == "linear":
        return lr * max(0.0, 1.0 - (1.0 - floor) * progress)
    cosine = math.cos(math.pi * progress)
    return lr * max(0.0, 0.5 * ((1.0 + floor) + (1.0 - floor) * cosine))


def batch_indices(step: int, batch_size: int, total: int, seed: int) -> Tensor:
    """Sample indices of a step, int64 `[batch_size]`, by seeded permutations of `range(total)`."""
    epoch_parts = EpochOrder(total, seed).parts(step * batch_size, batch_size)
    return torch.from_numpy(np.concatenate([indices for _, indices in epoch_parts]))
