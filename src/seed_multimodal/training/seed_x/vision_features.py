"""Features of images by SEED-X's frozen vision encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seed_multimodal.diffusion.layout import pooled_tokens
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import normalise
from seed_multimodal.training.frozen_features import FrozenFeatures


class VisionFeatures(FrozenFeatures):
    """Views → features `[N, places, K]`, in the encoder's precision. `tokens`: places after pooling neighbours
    (`pooled_tokens`), which must divide the encoder's; 0: no pooling."""

    def __init__(self, encoder: nn.Module, device: torch.device, at_once: int = 16, tokens: int = 0) -> None:
        super().__init__(encoder, device, at_once)
        self.tokens = tokens

    def compute(self, pixels: Tensor) -> Tensor:
        """See `FrozenFeatures`."""
        return self.see(normalise(pixels))

    @torch.no_grad()
    def see(self, pixels: Tensor) -> Tensor:
        """Features of normalised pixels on the device. Raises ConfigError: they cannot be pooled to `tokens`."""
        seen = self.model(pixels.to(self.dtype)).to(self.dtype)
        if self.tokens and seen.shape[1] % self.tokens:
            raise ConfigError(f"The encoder's {seen.shape[1]} embeddings cannot be pooled to {self.tokens}.")
        return pooled_tokens(seen, self.tokens or seen.shape[1])
