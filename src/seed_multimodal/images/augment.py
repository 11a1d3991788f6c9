"""`blip2_image_train`, the random transform of tokenizer training: a crop of half to all of the area, resized
bicubically, mirrored half of the time, with CLIP's normalisation; no RandAugment.

Draws come from the `torch.Generator` of the caller in torchvision's order, so the same state gives torchvision's crops;
torchvision's own classes take no generator, so that a sample's view could not be a function of (seed, epoch, index).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import ImageSource, open_image, reduction, to_rgb
from seed_multimodal.images.transforms import normalise, resize_passes, to_bytes
from seed_multimodal.settings import check_settings, setting

RATIO = (3 / 4, 4 / 3)  # width / height of the crop
Box = tuple[int, int, int, int]  # left, top, width, height


@dataclass(frozen=True)
class TrainTransform:
    """An image → a random view, float32 [3, S, S] normalised with CLIP's mean and deviation.

    `min_scale`, `max_scale`: range of the crop's share of the image's area; `flip`: probability of the mirror image;
    `scaled_decoding`: `read` decodes a JPEG at 1/2, 1/4 or 1/8 of its size where the crop then still has the view's
    size (the same crop in half of the time); False: decoded in full and resized by Pillow, as released.
    """

    image_size: int = setting(224, least=1)
    min_scale: float = setting(0.5, above=0, most=1)
    max_scale: float = setting(1.0, above=0, most=1)
    flip: float = setting(0.5, least=0, most=1)
    scaled_decoding: bool = True

    def __post_init__(self) -> None:
        check_settings(self, "training transform")
        if self.min_scale > self.max_scale:
            raise ConfigError(f"min_scale {self.min_scale} must be at most max_scale {self.max_scale}.")

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        return normalise(to_bytes(self.view(image, generator)))

    def view(self, image: Image.Image, generator: torch.Generator | None = None) -> Image.Image:
        """The random view as an RGB image of S x S pixels."""
        image = image if image.mode == "RGB" else to_rgb(image)
        view = self._crop(image, self.crop_box(image.size, generator))
        return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self._mirrored(generator) else view

    def read(self, source: ImageSource, *, name: str | None = None, generator: torch.Generator | None = None) -> Tensor:
        """A stored image → a random view, uint8 [3, S, S] for `normalise`; draws as `view`, raises as `open_image`."""
        drawn: list[tuple[Box, int]] = []

        def divisor(size: tuple[int, int]) -> int:
            box = self.crop_box(size, generator)
            drawn.append((box, reduction(box[2:], self.image_size, exact_up_to=0)))
            return drawn[0][1]

        image = open_image(source, name=name, divisor=divisor if self.scaled_decoding else None)
        if drawn:
            view = self._crop_scaled(image, *drawn[0])
        else:  # decoded in full
            view = to_bytes(self._crop(image, self.crop_box(image.size, generator)))
        return view.flip(2) if self._mirrored(generator) else view

    def _crop(self, image: Image.Image, box: Box) -> Image.Image:
        left, top, width, height = box
        crop = image.crop((left, top, left + width, top + height))
        return resize_passes(crop, (self.image_size, self.image_size), Image.Resampling.BICUBIC)

    def _crop_scaled(self, image: Image.Image, box: Box, factor: int) -> Tensor:
        """The box, of the full size, out of the image decoded at 1/factor → uint8 [3, S, S]; torch's resampling is
        Pillow's with rounder weights (single grey levels differ), in a third of the time."""
        left, top, width, height = box
        edges = [round(edge / factor) for edge in (left, top, left + width, top + height)]
        pixels = to_bytes(image.crop((edges[0], edges[1], edges[2], edges[3])))
        size = (self.image_size, self.image_size)
        return F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]

    def _mirrored(self, generator: torch.Generator | None) -> bool:
        return torch.rand(1, generator=generator).item() < self.flip

    def crop_box(self, size: tuple[int, int], generator: torch.Generator | None = None) -> Box:
        """Draw (left, top, width, height) inside an image of `size` (width, height)."""
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
        w = width if width / height <= RATIO[1] else int(round(height * RATIO[1]))
        h = height if width / height >= RATIO[0] else int(round(width / RATIO[0]))
        return (width - w) // 2, (height - h) // 2, w, h

    def describe(self) -> list[str]:
        """The steps in order, in the released configuration's words."""
        crop = f"RandomResizedCrop scale=({self.min_scale:.7g}, {self.max_scale:.1f}) " \
               f"ratio=({RATIO[0]:.7g}, {RATIO[1]:.7g})"
        return [crop, "RandomHorizontalFlip", "ToTensor", "Normalize"]
