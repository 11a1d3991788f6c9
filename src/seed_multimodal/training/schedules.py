"""Learning rates as functions of the step, optimiser groups, and the endless seeded order of samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seed_multimodal.data.steps import EpochOrder
from seed_multimodal.training.settings import StageSettings


def learning_rate(step: int, settings: StageSettings) -> float:
    """Linear warm-up, then cosine from `lr` to `lr · min_lr_ratio` at the last step."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * cosine)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: matrices decay, vectors (biases, norms) do not; frozen parameters are left out."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]


def batch_indices(step: int, batch_size: int, total: int, seed: int) -> Tensor:
    """Indices of the samples of one step: walks seeded permutations of `range(total)` without end.

    Returns int64 `[batch_size]`; a pure function of its arguments, so any step can be reproduced alone.
    """
    parts = EpochOrder(total, seed).parts(step * batch_size, batch_size)
    return torch.from_numpy(np.concatenate([chosen for _, chosen in parts]))
