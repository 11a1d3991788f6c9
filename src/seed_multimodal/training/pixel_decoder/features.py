"""What a pixel decoder learns from: conditions of images and the autoencoder's latents, both of frozen models.

The autoencoder computes in float32 whatever the run's precision: SDXL's overflows in float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.training.frozen_features import FrozenFeatures


class LatentMoments(FrozenFeatures):
    """Images → mean and logarithm of the variance of their latents `[N, 2 C, h, w]`, not scaled."""

    def compute(self, pixels: Tensor) -> Tensor:
        """See `FrozenFeatures`."""
        return self.model.encode(pixels.float() / 127.5 - 1.0).latent_dist.parameters


class ImageFeatures:
    """Conditions and latents of a batch of `DrawnPairs` of one size, on the device."""

    def __init__(self, seen: FrozenFeatures, moments: LatentMoments) -> None:
        self.seen, self.moments, self.device = seen, moments, moments.device

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`seen`; `moments`; with condition images `condition` `[B, C, h, w]`, the means of their latents, zeros where
        a sample has none."""
        with torch.autocast(self.device.type, enabled=False):
            made = {"seen": self.seen(batch["seen"]), "moments": self.moments(batch["image"])}
            if "condition" in batch:
                channels = made["moments"].shape[1] // 2
                made["condition"] = torch.zeros_like(made["moments"][:, :channels])
                rows = batch["conditioned"].nonzero().flatten()
                if len(rows):
                    made["condition"][rows.to(self.device)] = self.moments(batch["condition"][rows])[:, :channels]
        return made


def drawn_latents(moments: Tensor, scaling: float, generator: torch.Generator | None = None) -> Tensor:
    """Latents `[B, C, h, w]` of their distributions, times the autoencoder's factor; `generator` on the CPU."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise) * scaling
