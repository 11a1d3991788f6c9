"""Features of pixels by frozen models, computed on the training device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.device import copy_to
from seed_multimodal.weights import fingerprint


class FrozenFeatures:
    """uint8 pixels `[N, 3, S, S]` on the CPU → features `[N, ...]` on the device, without gradients.

    `compute`: pixels on the device → features; `at_once`: images per forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        compute: Callable[[Tensor], Tensor],
        at_once: int = 16,
    ) -> None:
        self.model: Any = model.requires_grad_(False).eval().to(device)
        self.device, self.compute, self.at_once = device, compute, at_once
        self.fingerprint = fingerprint(model)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.cat(
            [self.compute(copy_to(self.device, part)) for part in pixels.split(self.at_once)]
        )
