"""Frozen models of a training: features of pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn

from seed_multimodal.device import copy_to
from seed_multimodal.fingerprints import fingerprint


class FrozenFeatures:
    """uint8 pixels `[N, 3, S, S]` on the CPU → features `[N, ...]` on the device, without
    gradients.

    compute: pixels on the device → features.
    batch_size: images per forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        compute: Callable[[Tensor], Tensor],
        batch_size: int = 16,
    ) -> None:
        self.model = model.requires_grad_(False).eval().to(device)
        self.device = device
        self.compute = compute
        self.batch_size = batch_size

    @cached_property
    def fingerprint(self) -> str:
        """See `fingerprints`."""
        return fingerprint(self.model)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        batches = pixels.split(self.batch_size)
        return torch.cat([self.compute(copy_to(self.device, batch)) for batch in batches])
