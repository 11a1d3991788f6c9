"""What a de-tokenizer's training holds on a device: a count, printed at the start.

Activations come on top; they grow with the batch and the resolution, and shrink with gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from seed_multimodal.training.llm.memory import GIB, Spread, held_bytes

_NAMES = {"weights": "U-Net and resampler", "gradients": "gradients", "states": "optimiser states",
          "average": "averaged weights", "tower": "vision tower", "autoencoder": "autoencoder"}


@dataclass(frozen=True)
class HeldMemory:
    """Bytes of one process's device."""

    weights: float
    gradients: float
    states: float
    average: float
    tower: float
    autoencoder: float

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = [f"{_NAMES[field.name]} {_size(getattr(self, field.name))}" for field in fields(self)
                 if getattr(self, field.name)]
        return f"{_size(self.total)}: " + ", ".join(parts)


def held_memory(adapter: nn.Module, *, world: int = 1, deepspeed: Mapping[str, Any] | None = None,
                precision: str = "bf16", ema: bool = False, tower: float = 0, autoencoder: float = 0) -> HeldMemory:
    """The count of a run.

    Args:
        adapter: on any device (also `meta`), with what is trained switched on.
        deepspeed: a block of `zero.fill_config`. tower, autoencoder: bytes that both hold, 0 where features are kept.
    """
    counts = {trained: sum(p.numel() for p in adapter.parameters() if p.requires_grad == trained)
              for trained in (False, True)}
    zero = (deepspeed or {}).get("zero_optimization") or {}
    on_cpu = (zero.get("offload_optimizer") or {}).get("device") in ("cpu", "nvme")
    spread = Spread(world, int(zero.get("stage", 0)), deepspeed is not None, on_cpu)
    weights, gradients, states = held_bytes(counts[False], counts[True], spread, 4 if precision == "fp32" else 2, 4.0)
    return HeldMemory(weights, gradients, states, 4.0 * counts[True] * ema, tower, autoencoder)


def _size(value: float) -> str:
    return f"{value / GIB:.1f} GiB" if value >= 0.1 * GIB else f"{value / 2**20:.1f} MiB"
