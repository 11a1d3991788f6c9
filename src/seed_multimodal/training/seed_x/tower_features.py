"""Features of pictures by a frozen Qwen tower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from seed_multimodal.diffusion.layout import pooled_tokens
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import normalise
from seed_multimodal.seed_x.vision import QwenVit
from seed_multimodal.training.frozen_features import FrozenFeatures
from seed_multimodal.training.llm.model_settings import find_folder
from seed_multimodal.training.seed_x.tuning_settings import TowerModel


class TowerFeatures(FrozenFeatures):
    """Views → features `[N, places, K]` of a vision tower, in its precision.

    Args:
        tower, at_once, cache: see `FrozenFeatures`.
        tokens: places after pooling neighbours (`pooled_tokens`), which must divide the tower's; 0: no pooling.
    """

    def __init__(self, tower: nn.Module, device: torch.device, at_once: int = 16, cache: str | Path | None = None,
                 tokens: int = 0) -> None:
        super().__init__(tower, device, at_once, cache, variant=f"-{tokens}" if tokens else "")
        self.tokens = tokens

    @classmethod
    def open(cls, settings: TowerModel, device: torch.device, dtype: torch.dtype,
             log: Callable[[str], None] | None = None) -> TowerFeatures:
        """Load the tower.

        Raises:
            CheckpointError: as `QwenVit.from_pretrained`.
        """
        tower = QwenVit.from_pretrained(find_folder(settings.path), config=settings.sizes, device=device, dtype=dtype,
                                        log=log)
        return cls(tower, device, settings.at_once, settings.cache)

    def compute(self, pixels: Tensor) -> Tensor:
        """See `FrozenFeatures`."""
        return self.see(normalise(pixels))

    @torch.no_grad()
    def see(self, pixels: Tensor) -> Tensor:
        """Features of pixels that are normalised and on the device.

        Raises:
            ConfigError: they cannot be pooled to `tokens`.
        """
        seen = self.model(pixels.to(self.dtype)).to(self.dtype)
        if self.tokens and seen.shape[1] % self.tokens:
            raise ConfigError(f"The tower's {seen.shape[1]} embeddings of a picture cannot be pooled to {self.tokens}; "
                              "tokens must divide them.")
        return pooled_tokens(seen, self.tokens or seen.shape[1])
