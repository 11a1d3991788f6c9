"""What a pixel decoder's training holds on a device: a count, printed at the start.

Activations come on top; they grow with the batch and the resolution, and shrink with gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from seed_multimodal.training.llm.memory import GIB, Spread, held_bytes

_NAMES = {"weights": "U-Net and resampler", "gradients": "gradients", "states": "optimiser states",
          "average": "averaged weights"}


@dataclass(frozen=True)
class HeldMemory:
    """Bytes of one process's device; `frozen`: of the models beside the trained one, by name."""

    weights: float
    gradients: float
    states: float
    average: float
    frozen: Mapping[str, float] = field(default_factory=dict)
    trained: str = _NAMES["weights"]

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by what holds them."""
        own = {self.trained if name == "weights" else said: float(getattr(self, name))
               for name, said in _NAMES.items()}
        return {**own, **self.frozen}

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        return f"{_size(self.total)}: " + ", ".join(f"{by} {_size(held)}" for by, held in self.parts.items() if held)


def held_memory(module: nn.Module, *, world: int = 1, deepspeed: Mapping[str, Any] | None = None,
                precision: str = "bf16", ema: bool = False, frozen: Mapping[str, float] | None = None,
                trained: str = _NAMES["weights"]) -> HeldMemory:
    """The count of a run.

    Args:
        module: on any device (also `meta`), with what is trained switched on; `trained`: what it is called.
        deepspeed: a block of `zero.fill_config`. frozen: bytes of other models, 0 where their features are kept.
    """
    counts = {learns: sum(p.numel() for p in module.parameters() if p.requires_grad == learns)
              for learns in (False, True)}
    zero = (deepspeed or {}).get("zero_optimization") or {}
    on_cpu = (zero.get("offload_optimizer") or {}).get("device") in ("cpu", "nvme")
    spread = Spread(world, int(zero.get("stage", 0)), deepspeed is not None, on_cpu)
    weights, gradients, states = held_bytes(counts[False], counts[True], spread, 4 if precision == "fp32" else 2, 4.0)
    return HeldMemory(weights, gradients, states, 4.0 * counts[True] * ema, dict(frozen or {}), trained)


def _size(value: float) -> str:
    return f"{value / GIB:.1f} GiB" if value >= 0.1 * GIB else f"{value / 2**20:.1f} MiB"
