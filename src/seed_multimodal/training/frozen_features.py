"""Features of pixels by frozen models, computed on the training device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.device import copy_to
from seed_multimodal.weights import some_weights


class FrozenFeatures:
    """uint8 pixels `[N, 3, S, S]` on the CPU → features `[N, ...]` on the device, without gradients.

    A subclass has `compute`; `at_once` images share a forward pass.
    """

    def __init__(self, model: nn.Module, device: torch.device, at_once: int = 16) -> None:
        self.model: Any = model.requires_grad_(False).eval().to(device)
        self.device, self.at_once, self.dtype = device, at_once, next(model.parameters()).dtype
        self.some_weights = some_weights(model)

    def compute(self, pixels: Tensor) -> Tensor:
        """uint8 `[B, 3, S, S]` on the device → features `[B, ...]`."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.compute(copy_to(self.device, part)) for part in pixels.split(self.at_once)])
