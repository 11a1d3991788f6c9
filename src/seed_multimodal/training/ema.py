"""An exponential moving average of the trained weights."""

from __future__ import annotations

import torch
from torch import nn


class Ema:
    """Exponential moving average of a module's parameters, in fp32."""

    def __init__(self, modules: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {
            n: p.detach().clone().float() for n, p in modules.named_parameters() if p.requires_grad
        }

    def update(self, modules: nn.Module, step: int) -> None:
        """Update the average; the decay is lower in the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        own = dict(modules.named_parameters())
        for name, average in self.shadow.items():
            average.lerp_(own[name].detach().float(), 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, modules: nn.Module) -> None:
        """Overwrite the module's parameters with the averages."""
        own = dict(modules.named_parameters())
        for name, average in self.shadow.items():
            own[name].copy_(average)
