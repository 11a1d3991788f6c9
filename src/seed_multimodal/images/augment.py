"""`blip2_image_train`, the random transform of tokenizer training: a crop of half to all of the
area, resized bicubically, mirrored half of the time, with CLIP's normalisation; no RandAugment.

Crops are torchvision's, sampled from the caller's `torch.Generator`, so that a view is determined
by (seed, epoch, index).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import ImageSource, StoredImage, reduction_factor
from seed_multimodal.images.transforms import (
    INTERPOLATIONS,
    normalise,
    plain_rgb,
    resize_passes,
    to_bytes,
)
from seed_multimodal.settings import check_settings, fraction, positive, setting

RATIO = (3 / 4, 4 / 3)  # width / height of the crop
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class TrainTransform:
    """An image → a random view, float32 [3, S, S] normalised with CLIP's mean and deviation.

    min_scale, max_scale: range of the crop's share of the image's area.
    flip: probability of the mirror image.
    scaled_decoding: `read` decodes a JPEG at 1/2, 1/4 or 1/8 of its size where the crop then still
        has the view's size (the same crop in half of the time); False: decoded in full and resized
        by Pillow, as in the original.
    interpolation: the original's is bicubic.
    """

    image_size: int = positive(224)
    min_scale: float = setting(0.5, above=0, maximum=1)
    max_scale: float = setting(1.0, above=0, maximum=1)
    flip: float = fraction(0.5)
    scaled_decoding: bool = True
    interpolation: str = setting("bicubic", choices=tuple(INTERPOLATIONS))

    def __post_init__(self) -> None:
        check_settings(self, "training transform")
        if self.min_scale > self.max_scale:
            raise ConfigError(
                f"min_scale {self.min_scale} must be at most max_scale {self.max_scale}."
            )

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        box = self.crop_box(image.size, generator)
        return normalise(self._view(plain_rgb(image), box, generator))

    def read(
        self,
        source: ImageSource,
        *,
        name: str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A stored image → a random view, uint8 [3, S, S] for `normalise`.

        Raises as `open_image`.
        """
        stored = StoredImage(source, name)
        in_torch = self.scaled_decoding and self.interpolation in ("bilinear", "bicubic")
        if not (in_torch and stored.is_jpeg):
            image = stored.decode()
            box = self.crop_box(image.size, generator)
            return self._view(image, box, generator)

        # 1. The box in the upright image.
        box = self.crop_box(stored.upright(stored.size), generator)

        # 2. The same box in the reduced image, cut out: uint8 [3, h, w].
        left, top, right, bottom = box
        factor = reduction_factor((right - left, bottom - top), self.image_size)
        left, top, right, bottom = (round(edge / factor) for edge in box)
        pixels = to_bytes(stored.decode(factor).crop((left, top, right, bottom)))

        # 3. torch's resampling is Pillow's with rounder weights (single grey levels differ), in a
        #    third of the time.
        size = (self.image_size, self.image_size)
        view = F.interpolate(pixels[None], size, mode=self.interpolation, antialias=True)[0]
        return self._mirrored(view, generator)

    def _view(self, image: Image.Image, box: Box, generator: torch.Generator | None) -> Tensor:
        size = (self.image_size, self.image_size)
        resized = resize_passes(image.crop(box), size, INTERPOLATIONS[self.interpolation])
        return self._mirrored(to_bytes(resized), generator)

    def _mirrored(self, view: Tensor, generator: torch.Generator | None) -> Tensor:
        is_mirrored = torch.rand(1, generator=generator).item() < self.flip
        return view.flip(2) if is_mirrored else view

    def crop_box(self, size: tuple[int, int], generator: torch.Generator | None = None) -> Box:
        """Sample a box inside an image of `size` (width, height), as torchvision does."""
        from torchvision.transforms import RandomResizedCrop  # slow to import

        # torchvision reads the size of the image alone.
        width, height = size
        image = torch.empty(1, height, width, device="meta")
        scales = [self.min_scale, self.max_scale]
        # It samples from the global generator, which gets the state of `generator` meanwhile.
        generator = generator or torch.default_generator
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator.get_state())
            top, left, h, w = RandomResizedCrop.get_params(image, scales, [*RATIO])
            state = torch.get_rng_state()
        generator.set_state(state)
        return left, top, left + w, top + h
