"""`blip2_image_train`, the random transform of tokenizer training: a crop of half to all of the area, resized
bicubically, mirrored half of the time, with CLIP's normalisation; no RandAugment.

Random numbers come from the caller's `torch.Generator` in torchvision's order, so the same state gives torchvision's
crops; torchvision's classes accept no generator, so a view would not be determined by (seed, epoch, index).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import ImageSource, StoredImage, reduction_factor
from seed_multimodal.images.transforms import normalise, plain_rgb, resize_passes, to_bytes
from seed_multimodal.settings import check_settings, setting

RATIO = (3 / 4, 4 / 3)  # width / height of the crop
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class TrainTransform:
    """An image → a random view, float32 [3, S, S] normalised with CLIP's mean and deviation.

    `min_scale`, `max_scale`: range of the crop's share of the image's area; `flip`: probability of the mirror image;
    `scaled_decoding`: `read` decodes a JPEG at 1/2, 1/4 or 1/8 of its size where the crop then still has the view's
    size (the same crop in half of the time); False: decoded in full and resized by Pillow, as in the original.
    """

    image_size: int = setting(224, minimum=1)
    min_scale: float = setting(0.5, above=0, maximum=1)
    max_scale: float = setting(1.0, above=0, maximum=1)
    flip: float = setting(0.5, minimum=0, maximum=1)
    scaled_decoding: bool = True

    def __post_init__(self) -> None:
        check_settings(self, "training transform")
        if self.min_scale > self.max_scale:
            raise ConfigError(
                f"min_scale {self.min_scale} must be at most max_scale {self.max_scale}."
            )

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        return normalise(
            self._view(plain_rgb(image), self.crop_box(image.size, generator), generator)
        )

    def read(
        self,
        source: ImageSource,
        *,
        name: str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A stored image → a random view, uint8 [3, S, S] for `normalise`; raises as `open_image`."""
        stored, size = StoredImage(source, name), self.image_size
        if not (self.scaled_decoding and stored.is_jpeg):
            image = stored.decode()
            return self._view(image, self.crop_box(image.size, generator), generator)
        box = self.crop_box(
            stored.size[::-1] if stored.orientation() in range(5, 9) else stored.size, generator
        )
        factor = reduction_factor((box[2] - box[0], box[3] - box[1]), size)
        left, top, right, bottom = (round(edge / factor) for edge in box)
        pixels = to_bytes(stored.decode(factor).crop((left, top, right, bottom)))
        # torch's resampling is Pillow's with rounder weights (single grey levels differ), in a third of the time.
        view = F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]
        return self._mirrored(view, generator)

    def _view(self, image: Image.Image, box: Box, generator: torch.Generator | None) -> Tensor:
        size = (self.image_size, self.image_size)
        return self._mirrored(
            to_bytes(resize_passes(image.crop(box), size, Image.Resampling.BICUBIC)), generator
        )

    def _mirrored(self, view: Tensor, generator: torch.Generator | None) -> Tensor:
        return view.flip(2) if torch.rand(1, generator=generator).item() < self.flip else view

    def crop_box(self, size: tuple[int, int], generator: torch.Generator | None = None) -> Box:
        """Draw a box inside an image of `size` (width, height)."""
        width, height = size
        low, high = math.log(RATIO[0]), math.log(RATIO[1])
        for _ in range(10):
            share = (
                torch.empty(1).uniform_(self.min_scale, self.max_scale, generator=generator).item()
            )
            area = width * height * share
            shape = torch.exp(torch.empty(1).uniform_(low, high, generator=generator)).item()
            w, h = int(round(math.sqrt(area * shape))), int(round(math.sqrt(area / shape)))
            if 0 < w <= width and 0 < h <= height:
                top = int(torch.randint(0, height - h + 1, (1,), generator=generator).item())
                left = int(torch.randint(0, width - w + 1, (1,), generator=generator).item())
                return left, top, left + w, top + h
        # No valid sample (extreme aspect ratio): the largest centre crop within the ratio limits.
        w = width if width / height <= RATIO[1] else int(round(height * RATIO[1]))
        h = height if width / height >= RATIO[0] else int(round(width / RATIO[0]))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h
