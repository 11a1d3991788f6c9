"""Learning rates as pure functions of the step, for exact resuming."""

from __future__ import annotations

import math

from seed_multimodal.training.config import OptimSettings, StageSettings

INVERSE_SQRT_STEPS = 10_000  # scale of this schedule without warm-up, as in transformers


def scheduled_rate(
    kind: str,
    position: int,
    peak: float,
    max_steps: int,
    *,
    warmup: int,
    floor: float,
    clamp: bool = True,
) -> float:
    """Rate of a schedule at `position`: linear warm-up from 0 at position 0, then its decay.

    Defaults are those of transformers: one cycle, and the power 1.

    Source: AILab-CVC/SEED `MultiModalLLM/src/train/optimization.py`.

    Args:
        position: of `max_steps`; of optimizer steps or micro-batches, as `max_steps` and `warmup`.
        kind: one of `SCHEDULES`.
        floor: share of the peak at `max_steps`.
        clamp: keep the final rate beyond `max_steps`; the original schedules rise again along the
            cosine.
    """
    if kind == "constant":  # without warm-up, as in transformers
        return peak
    if position < warmup:
        return peak * position / warmup
    if kind == "constant_with_warmup":
        return peak
    if kind == "inverse_sqrt":
        scale = warmup or INVERSE_SQRT_STEPS
        return peak * math.sqrt(scale / (position - warmup + scale))
    progress = (position - warmup) / max(1, max_steps - warmup)
    if clamp:
        progress = min(1.0, progress)
    if kind.startswith("cosine"):
        # Half a cosine from 1 to `floor`, which rises again beyond a progress of 1.
        share = 0.5 * ((1.0 + floor) + (1.0 - floor) * math.cos(math.pi * progress))
    else:  # linear, polynomial
        share = 1.0 - (1.0 - floor) * progress
    return peak * max(0.0, share)


def learning_rate(step: int, settings: StageSettings) -> float:
    """Rate of a stage's step (0-based), from above 0 to `learning_rate · min_lr_ratio`.

    The cosine, as in LAVIS, begins at the first step after the warm-up, the others at its last.
    """
    micro_steps = 1
    if settings.schedule_per_micro_batch:
        micro_steps = settings.gradient_accumulation_steps
    position = (step + 1) * micro_steps
    if settings.lr_scheduler_type == "cosine" and position > settings.warmup_steps:
        position -= 1
    return scheduled_rate(
        settings.lr_scheduler_type,
        position,
        settings.learning_rate,
        settings.max_steps * micro_steps,
        warmup=settings.warmup_steps,
        floor=settings.min_lr_ratio,
    )


def peak_rate(settings: OptimSettings) -> float:
    """The schedule's highest rate: `learning_rate`, or if it is 0 the largest of `part_rates`."""
    return settings.learning_rate or max(settings.part_rates.values(), default=0.0)


def optim_learning_rate(
    step: int, settings: OptimSettings, max_steps: int, micro_batches: int = 1
) -> float:
    """Learning rate of optimizer step `step` (0-based) of `max_steps`, of `micro_batches` each.

    With warm-up the first step has a rate of 0.
    """
    position = step
    if settings.schedule_per_micro_batch:
        # SEED-X's loop advances its schedule per micro-batch, but not `max_steps`; a step uses the
        # rate of its last one.
        position = micro_batches * (step + 1) - 1
    return scheduled_rate(
        settings.lr_scheduler_type,
        position,
        peak_rate(settings),
        max_steps,
        warmup=warmup_count(max_steps, settings.warmup_ratio, settings.warmup_steps),
        floor=settings.min_lr_ratio,
        clamp=not settings.schedule_per_micro_batch,
    )


def warmup_count(max_steps: int, ratio: float, steps: int) -> int:
    """Warm-up steps as transformers computes them, in floats: 7 % of 50,000 steps are 3501."""
    return steps if steps > 0 else math.ceil(max_steps * ratio)
