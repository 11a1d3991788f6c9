"""Learning rates as functions of the step, for language models and stages, and the endless seeded order of samples.

`cosine` with its floor is the released schedule and is computed here, as are `linear` and the constant ones; every
other name of transformers' `SchedulerType` is computed by the function that `transformers.get_scheduler` takes for it.
The two that follow a measured loss (`reduce_lr_on_plateau`, `greedy`) are refused: a rate that is a function of the
step continues exactly after a kill.
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
# transformers' other names -> the option of its function that says where the rate ends, as a share of the highest
# (`rate`) or as a rate (`end`); `scaled`: it has none, so its course is scaled to end there; `none`: it has no end.
_FLOORS = {"cosine_with_restarts": "scaled", "polynomial": "end", "inverse_sqrt": "none", "cosine_with_min_lr": "rate",
           "cosine_warmup_with_min_lr": "rate", "warmup_stable_decay": "min_lr_ratio"}
_BY_LOSS = ("reduce_lr_on_plateau", "greedy")
USABLE = (*OWN, *_FLOORS)
KINDS = (*USABLE, *_BY_LOSS)


def learning_rate(step: int, settings: StageConfig) -> float:
    """Linear warm-up, then by default a cosine from `lr` to `lr · min_lr_ratio` at the last step.

    A stage's first step has a rate already: other kinds than the cosine are therefore one step ahead of a language
    model's.
    """
    kind = settings.lr_scheduler_type
    if kind != "cosine":
        return scheduled_rate(kind, step + 1, settings.learning_rate, settings.max_steps, warmup=settings.warmup_steps,
                              floor=settings.min_lr_ratio, options=settings.lr_scheduler_kwargs)
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.max_steps - settings.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return settings.learning_rate * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * cosine)


def warmup_count(max_steps: int, ratio: float = 0.0, steps: int = 0) -> int:
    """Warm-up steps as transformers resolves them: `steps` if given, else `max_steps · ratio`, rounded up.

    In floating point, as released: 7 % of 50,000 steps are 3501.
    """
    return steps if steps > 0 else math.ceil(max_steps * ratio)


def scheduled_rate(
    kind: str, step: int, lr: float, max_steps: int, *, warmup: int = 0, floor: float = 0.0, micro_batches: int = 1,
    clamp: bool = True, options: Mapping[str, Any] | None = None,
) -> float:
    """The language models' schedules: linear warm-up from 0, then `kind`, down to `lr · floor` at `max_steps`.

    Args:
        kind: one of `KINDS`; `constant` has no warm-up, and those without an end (`constant_with_warmup`,
            `inverse_sqrt`) no floor.
        step: optimiser steps taken before this one; the first has a rate of 0 if there is a warm-up.
        micro_batches: SEED-X's loop advances its schedule once per micro-batch; the number of them in an optimiser step
            then makes warm-up and decay so much faster, and every step takes the rate of its last micro-batch.
        clamp: stay at the end's rate beyond `max_steps`. The released schedules rise again along the cosine.
        options: of the kinds that transformers computes (its `scheduler_specific_kwargs`: `power`, `num_cycles`, …).

    Source: AILab-CVC/SEED `MultiModalLLM/src/train/optimization.py`; golden fixture `lr_schedule`.

    Raises:
        ConfigError: an unknown kind, one that follows the loss, or options that its function does not take.
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
    """Refuse a schedule that is unknown or follows the loss, and options where there are none.

    Raises:
        ConfigError: as said.
    """
    if kind not in KINDS:
        raise ConfigError(f"Unknown schedule {kind!r}{nearest(kind, USABLE)}: use one of {', '.join(USABLE)}.")
    if kind in _BY_LOSS:
        raise ConfigError(f"The schedule {kind!r} follows a measured loss; here the rate is a function of the step, so "
                          f"that a killed run continues exactly: use one of {', '.join(USABLE)}.")
    if options and kind in OWN:
        raise ConfigError(f"The schedule {kind!r} takes no lr_scheduler_kwargs ({', '.join(options)}); it has warm-up "
                          f"and min_lr_ratio.")


def _by_transformers(kind: str, at: int, lr: float, max_steps: int, warmup: int, floor: float,
                     options: dict[str, Any]) -> float:
    """The rate by transformers' own function of this kind, which ends at `lr · floor` unless `options` say where."""
    if lr == 0:
        return 0.0
    how = _FLOORS[kind]
    if how == "rate" and not {"min_lr", "min_lr_rate"} & options.keys():
        options["min_lr_rate"] = floor
    elif how == "end" and floor:
        options.setdefault("lr_end", lr * floor)
    elif how not in ("rate", "end", "scaled", "none"):
        options.setdefault(how, floor)
    given = json.dumps(options, sort_keys=True)
    try:
        share = float(_function(kind, lr, max(max_steps, warmup + 1), warmup, given)(at))
        if not math.isfinite(share):
            raise ValueError(f"the rate of step {at} is {share}")
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"The schedule {kind!r} with lr_scheduler_kwargs {given}: {first_line(error)}") from error
    return lr * (floor + (1.0 - floor) * share) if how == "scaled" and at >= warmup else lr * share


@lru_cache(maxsize=32)
def _function(kind: str, lr: float, max_steps: int, warmup: int, options: str) -> Callable[[int], float]:
    """Step -> share of the highest rate, out of the scheduler that transformers makes for an optimiser of this rate."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    made: Any = get_scheduler(kind, optimizer, warmup, max_steps, json.loads(options))
    function: Callable[[int], float] = made.lr_lambdas[0]
    function(warmup)  # some options are looked at when a rate after the warm-up is computed
    return function


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
