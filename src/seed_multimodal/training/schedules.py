"""Learning rates as functions of the step, optimiser groups, and the endless seeded order of samples."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.stream.order import EpochOrder
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import nearest
from seed_multimodal.training.loop_settings import StageSettings

KINDS = ("cosine", "linear", "constant", "constant_with_warmup")


def learning_rate(step: int, settings: StageSettings) -> float:
    """Linear warm-up, then cosine from `lr` to `lr · min_lr_ratio` at the last step."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * cosine)


def warmup_count(max_steps: int, ratio: float = 0.0, steps: int = 0) -> int:
    """Warm-up steps as transformers resolves them: `steps` if given, else `max_steps · ratio`, rounded up.

    In floating point, as released: 7 % of 50,000 steps are 3501.
    """
    return steps if steps > 0 else math.ceil(max_steps * ratio)


def scheduled_rate(
    kind: str, step: int, lr: float, max_steps: int, *, warmup: int = 0, floor: float = 0.0, micro_batches: int = 1,
    clamp: bool = True,
) -> float:
    """The language models' schedules: linear warm-up from 0, then `kind`, down to `lr · floor` at `max_steps`.

    Args:
        kind: cosine, linear, constant_with_warmup, or constant (without warm-up).
        step: optimiser steps taken before this one; the first has a rate of 0 if there is a warm-up.
        micro_batches: SEED-X's loop advances its schedule once per micro-batch; the number of them in an optimiser step
            then makes warm-up and decay so much faster, and every step takes the rate of its last micro-batch.
        clamp: stay at the end's rate beyond `max_steps`. The released schedules rise again along the cosine.

    Source: AILab-CVC/SEED `MultiModalLLM/src/train/optimization.py`; golden fixture `lr_schedule`.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"Unknown schedule {kind!r}{nearest(kind, KINDS)}: use one of {', '.join(KINDS)}.")
    if kind == "constant":
        return lr
    at = micro_batches * (step + 1) - 1
    if at < warmup:
        return lr * at / max(1, warmup)
    if kind == "constant_with_warmup":
        return lr
    progress = (at - warmup) / max(1, max_steps - warmup)
    if clamp:
        progress = min(1.0, progress)
    if kind == "linear":
        return lr * max(0.0, 1.0 - (1.0 - floor) * progress)
    return lr * max(0.0, 0.5 * ((1.0 + floor) + (1.0 - floor) * math.cos(math.pi * progress)))


def epoch_rate(
    epoch: int, iteration: int, max_epoch: int, lr: float, min_lr: float, *, warmup_lr: float | None = None,
    warmup: int = 0, decay_rate: float | None = None,
) -> float:
    """LAVIS's `linear_warmup_cosine_lr` (with `decay_rate`: `linear_warmup_step_lr`), as the tokenizers were trained.

    Args:
        iteration: inside the epoch. It matters in the first epoch only, which warms up from `warmup_lr` (default: `lr`)
            over `warmup` iterations and then stays; every later epoch has one rate.
    """
    if epoch == 0:
        start = lr if warmup_lr is None else warmup_lr
        return min(lr, start + (lr - start) * iteration / max(warmup, 1))
    if decay_rate is not None:
        return max(min_lr, lr * decay_rate**epoch)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * epoch / max_epoch))


def batch_indices(step: int, batch_size: int, total: int, seed: int) -> Tensor:
    """Indices of the samples of one step: walks seeded permutations of `range(total)` without end.

    Returns int64 `[batch_size]`; a pure function of its arguments, so any step can be reproduced alone.
    """
    parts = EpochOrder(total, seed).parts(step * batch_size, batch_size)
    return torch.from_numpy(np.concatenate([chosen for _, chosen in parts]))
