"""The random transform of tokenizer training: a crop of half to all of the area, bicubic, then a mirror image or not.

Draws come from a `torch.Generator` given by the caller (or torch's global one) in torchvision's order, so the same
state gives torchvision's crops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.images.open import to_rgb
from seed_multimodal.images.transforms import INTERPOLATIONS, normalise, resize_passes


@dataclass(frozen=True)
class TrainingTransform:
    """A picture -> a random view, float32 [3, S, S].

    `scale`: range of the crop's share of the area; `ratio`: range of its width / height.
    """

    image_size: int = 224
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: str = "bicubic"

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        return normalise(self.view(image, generator))

    def view(self, image: Image.Image, generator: torch.Generator | None = None) -> Image.Image:
        """The random view as an RGB image of S x S pixels."""
        image = image if image.mode == "RGB" else to_rgb(image)
        left, top, width, height = self.crop_box(image.size, generator)
        cut = image.crop((left, top, left + width, top + height))
        view = resize_passes(cut, (self.image_size, self.image_size), INTERPOLATIONS[self.interpolation])
        if torch.rand(1, generator=generator).item() < self.flip:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return view

    def crop_box(
        self, size: tuple[int, int], generator: torch.Generator | None = None
    ) -> tuple[int, int, int, int]:
        """Draw (left, top, width, height) inside a picture of `size` (width, height)."""
        width, height = size
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = width * height * torch.empty(1).uniform_(*self.scale, generator=generator).item()
            shape = torch.exp(torch.empty(1).uniform_(low, high, generator=generator)).item()
            w, h = int(round(math.sqrt(area * shape))), int(round(math.sqrt(area / shape)))
            if 0 < w <= width and 0 < h <= height:
                top = int(torch.randint(0, height - h + 1, (1,), generator=generator).item())
                left = int(torch.randint(0, width - w + 1, (1,), generator=generator).item())
                return left, top, w, h
        # No draw fitted (a very long strip): the largest centred crop whose shape is allowed.
        w, h = width, height
        if width / height < self.ratio[0]:
            h = int(round(width / self.ratio[0]))
        elif width / height > self.ratio[1]:
            w = int(round(height * self.ratio[1]))
        return (width - w) // 2, (height - h) // 2, w, h

    def describe(self) -> list[str]:
        """The steps in order, in the released configuration's words."""
        crop = f"RandomResizedCrop scale=({self.scale[0]:.7g}, {self.scale[1]:.1f}) " \
               f"ratio=({self.ratio[0]:.7g}, {self.ratio[1]:.7g})"
        return [crop, "RandomHorizontalFlip", "ToTensor", "Normalize"]
