"""Learning rates as functions of the step, and the endless seeded order of samples.

`cosine` with its floor is the original schedule and is computed here, as are `linear` and the constant ones; every
other name of transformers' `SchedulerType` is computed by the function that `transformers.get_scheduler` takes for it.
Those that follow a measured loss are refused: a rate that is a function of the step resumes exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.stream.sampler import EpochOrder
from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.settings import nearest
from seed_multimodal.training.config import StageConfig

OWN = ("cosine", "linear", "constant", "constant_with_warmup")
# transformers' other names -> the option that says where the rate ends, as a share of the highest; "lr_end": as a rate;
# "scaled": there is none, so the rate is scaled to end there; "": it has no end.
_FLOORS = {"cosine_with_restarts": "scaled", "polynomial": "lr_end", "inverse_sqrt": "",
           "cosine_with_min_lr": "min_lr_rate", "cosine_warmup_with_min_lr": "min_lr_rate",
           "warmup_stable_decay": "min_lr_ratio"}
USABLE = (*OWN, *_FLOORS)
KINDS = (*USABLE, "reduce_lr_on_plateau", "greedy")


def learning_rate(step: int, settings: StageConfig) -> float:
    """Rate of a stage's step: linear warm-up, then by default a cosine from `learning_rate` to `learning_rate ·
    min_lr_ratio` at the last step. A stage's first step has a rate above 0 already."""
    kind, highest, warmup = settings.lr_scheduler_type, settings.learning_rate, settings.warmup_steps
    if kind != "cosine":
        return scheduled_rate(kind, step + 1, highest, settings.max_steps, warmup=warmup, floor=settings.min_lr_ratio,
                              options=settings.lr_scheduler_kwargs)
    if step < warmup:
        return highest * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.max_steps - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return highest * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * cosine)


def warmup_count(max_steps: int, ratio: float = 0.0, steps: int = 0) -> int:
    """Warm-up steps as transformers resolves them, in floating point: 7 % of 50,000 steps are 3501."""
    return steps if steps > 0 else math.ceil(max_steps * ratio)


def scheduled_rate(
    kind: str, step: int, lr: float, max_steps: int, *, warmup: int = 0, floor: float = 0.0, micro_batches: int = 1,
    clamp: bool = True, options: Mapping[str, Any] | None = None,
) -> float:
    """The language models' schedules: linear warm-up from 0, then `kind`, down to `lr · floor` at `max_steps`.

    Source: AILab-CVC/SEED `MultiModalLLM/src/train/optimization.py`.

    Args:
        step: optimiser steps taken before this one; the first has a rate of 0 if there is a warm-up.
        micro_batches: SEED-X's loop advances its schedule once per micro-batch; every step takes the rate of its last.
        clamp: stay at the end's rate beyond `max_steps`; the original schedules rise again along the cosine.
        options: of the kinds that transformers computes (its `scheduler_specific_kwargs`: `power`, `num_cycles`, …).

    Raises:
        ConfigError: an unknown kind, or options that its function does not take.
    """
    check_kind(kind, options)
    if kind == "constant":
        return lr
    at = micro_batches * (step + 1) - 1
    if kind in _FLOORS:
        return _by_transformers(kind, at, lr, max_steps, warmup, floor, dict(options or {}))
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


def check_kind(kind: str, options: Mapping[str, Any] | None = None) -> None:
    """Refuse a schedule that is unknown or follows the loss, and options where there are none. Raises ConfigError."""
    if kind not in USABLE:
        raise ConfigError(f"Unknown schedule {kind!r}{nearest(kind, USABLE)}: use one of {', '.join(USABLE)}."
                          if kind not in KINDS else
                          f"The schedule {kind!r} follows a measured loss; use one of {', '.join(USABLE)}.")
    if options and kind in OWN:
        raise ConfigError(f"The schedule {kind!r} takes no lr_scheduler_kwargs ({', '.join(options)}).")


def _by_transformers(kind: str, at: int, lr: float, max_steps: int, warmup: int, floor: float,
                     options: dict[str, Any]) -> float:
    """The rate by transformers' own function of this kind, which ends at `lr · floor` unless `options` say where."""
    if lr == 0:
        return 0.0
    end = _FLOORS[kind]
    if end and end != "scaled" and "min_lr" not in options:
        options.setdefault(end, (lr * floor or 1e-7) if end == "lr_end" else floor)
    given = json.dumps(options, sort_keys=True)
    try:
        share = float(_function(kind, lr, max(max_steps, warmup + 1), warmup, given)(at))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"The schedule {kind!r} with lr_scheduler_kwargs {given}: {first_line(error)}.") from error
    return lr * (floor + (1.0 - floor) * share) if end == "scaled" and at >= warmup else lr * share


@lru_cache(maxsize=32)
def _function(kind: str, lr: float, max_steps: int, warmup: int, options: str) -> Callable[[int], float]:
    """Step -> share of the highest rate, out of the scheduler that transformers makes for an optimiser of this rate."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    made: Any = get_scheduler(kind, optimizer, warmup, max_steps, json.loads(options))
    function: Callable[[int], float] = made.lr_lambdas[0]
    function(warmup)  # some options are looked at when a rate after the warm-up is computed
    return function


def batch_indices(step: int, batch_size: int, total: int, seed: int) -> Tensor:
    """Indices of the samples of one step, int64 `[batch_size]`: walks seeded permutations of `range(total)`."""
    parts = EpochOrder(total, seed).parts(step * batch_size, batch_size)
    return torch.from_numpy(np.concatenate([chosen for _, chosen in parts]))
