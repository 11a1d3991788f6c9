"""Whether two models are the same one, told by a few of their weights in whatever precision."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

_COUNT, _APART = 64, 0.02  # bf16 rounds to 0.004 of a number


def some_weights(model: nn.Module) -> list[float]:
    """Weights of a model, spread over its tensors."""
    tensors = [one.detach().flatten() for one in model.parameters() if one.numel()]
    picked = [tensors[place * len(tensors) // _COUNT] for place in range(_COUNT)] if tensors else []
    return [float(one[place * (len(one) - 1) // _COUNT]) for place, one in enumerate(picked)]


def same_weights(before: Sequence[float], now: Sequence[float]) -> bool:
    """Whether they are of one model, which may have been rounded since."""
    return len(before) == len(now) and all(
        math.isclose(one, other, rel_tol=_APART, abs_tol=1e-6) for one, other in zip(before, now, strict=True))
