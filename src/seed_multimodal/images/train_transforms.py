"""`blip2_image_train`, the random transform of tokenizer training: a crop of half to all of the area, resized
bicubically, mirrored half of the time, with CLIP's normalisation; no RandAugment.

Draws come from the `torch.Generator` given by the caller (or torch's global one) in torchvision's order, so the same
state gives torchvision's crops. torchvision's own classes take no generator, so that a sample's view could not be a
function of (seed, epoch, index); resizing is `transforms.resize_passes`. Evaluation uses
`transforms.seed_image_processor`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.open import to_rgb
from seed_multimodal.images.transforms import normalise, resize_passes
from seed_multimodal.settings import check_settings, setting

RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class TrainTransform:
    """A picture -> a random view, float32 [3, S, S] normalised with CLIP's mean and deviation.

    `min_scale`, `max_scale`: range of the crop's share of the picture's area (released: 0.5 to 1), whose width / height
    is in `RATIO`; `flip`: probability of the mirror image.
    """

    image_size: int = setting(224, least=1)
    min_scale: float = setting(0.5, above=0, most=1)
    max_scale: float = setting(1.0, above=0, most=1)
    flip: float = setting(0.5, least=0, most=1)

    def __post_init__(self) -> None:
        check_settings(self, "training transform")
        if self.min_scale > self.max_scale:
            raise ConfigError(f"min_scale {self.min_scale} must be at most max_scale {self.max_scale}.")

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        return normalise(self.view(image, generator))

    def view(self, image: Image.Image, generator: torch.Generator | None = None) -> Image.Image:
        """The random view as an RGB image of S x S pixels."""
        image = image if image.mode == "RGB" else to_rgb(image)
        left, top, width, height = self.crop_box(image.size, generator)
        cut = image.crop((left, top, left + width, top + height))
        view = resize_passes(cut, (self.image_size, self.image_size), Image.Resampling.BICUBIC)
        if torch.rand(1, generator=generator).item() < self.flip:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return view

    def crop_box(self, size: tuple[int, int], generator: torch.Generator | None = None) -> tuple[int, int, int, int]:
        """Draw (left, top, width, height) inside a picture of `size` (width, height)."""
        width, height = size
        low, high = math.log(RATIO[0]), math.log(RATIO[1])
        for _ in range(10):
            share = torch.empty(1).uniform_(self.min_scale, self.max_scale, generator=generator).item()
            area = width * height * share
            shape = torch.exp(torch.empty(1).uniform_(low, high, generator=generator)).item()
            w, h = int(round(math.sqrt(area * shape))), int(round(math.sqrt(area / shape)))
            if 0 < w <= width and 0 < h <= height:
                top = int(torch.randint(0, height - h + 1, (1,), generator=generator).item())
                left = int(torch.randint(0, width - w + 1, (1,), generator=generator).item())
                return left, top, w, h
        # No draw fitted (a very long strip): the largest centred crop whose shape is allowed.
        w, h = width, height
        if width / height < RATIO[0]:
            h = int(round(width / RATIO[0]))
        elif width / height > RATIO[1]:
            w = int(round(height * RATIO[1]))
        return (width - w) // 2, (height - h) // 2, w, h

    def describe(self) -> list[str]:
        """The steps in order, in the released configuration's words."""
        crop = f"RandomResizedCrop scale=({self.min_scale:.7g}, {self.max_scale:.1f}) " \
               f"ratio=({RATIO[0]:.7g}, {RATIO[1]:.7g})"
        return [crop, "RandomHorizontalFlip", "ToTensor", "Normalize"]
