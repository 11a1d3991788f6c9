"""`blip2_image_train`, the picture transform of tokenizer training, under the names its YAML uses.

A random crop of half to all of the area resized bicubically, mirrored half of the time, CLIP's normalisation; no
RandAugment. The drawing itself is `images.augment`; evaluation uses `images.transforms.seed_image_processor`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.augment import TrainingTransform


@dataclass(frozen=True)
class TrainTransform:
    """A picture -> a random view, float32 [3, S, S] normalised with CLIP's mean and deviation.

    `min_scale`, `max_scale`: range of the crop's share of the picture's area (released: 0.5 to 1).
    Draws come from the generator given, else from torch's global one.
    """

    image_size: int = 224
    min_scale: float = 0.5
    max_scale: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.image_size, bool) or not isinstance(self.image_size, int) or self.image_size < 1:
            raise ConfigError(f"image_size must be a positive number of pixels, not {self.image_size!r}.")
        if not 0 < self.min_scale <= self.max_scale <= 1:
            raise ConfigError(f"min_scale {self.min_scale} and max_scale {self.max_scale} must be shares of the area: "
                              "0 < min_scale <= max_scale <= 1.")

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        return TrainingTransform(self.image_size, scale=(self.min_scale, self.max_scale))(image, generator)
