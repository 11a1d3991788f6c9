"""Frames of videos, and augmented views of an image."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from seed_multimodal.errors import ImageError

SCALE = (1 / 1.08, 1 / 0.88)  # of a view's crop window; below 1 enlarges the image
SHIFT = 0.04  # fraction of a side


@dataclass(frozen=True)
class Frame:
    """Frame `number` of `count` of a video, as `images.io.ImageFunction`. Raises ImageError when it is called."""

    path: str
    count: int
    number: int

    def __call__(self) -> np.ndarray:
        return read_frames(self.path, self.count)[self.number]


@functools.lru_cache(maxsize=1)
def read_frames(path: str, count: int) -> list[np.ndarray]:
    """Frames uint8 [H, W, 3] at the centres of `count` equal segments of a video, as in the original (short videos
    repeat frames). Raises ImageError."""
    import cv2

    video = cv2.VideoCapture(path)
    total = int(video.get(cv2.CAP_PROP_FRAME_COUNT)) if video.isOpened() else 0
    if total < 1:
        raise ImageError(f"{path}: not a video in a known format, or without frames.")
    read: dict[int, np.ndarray] = {}
    places = [min(total - 1, int((number + 0.5) * total / count)) for number in range(count)]
    for place in dict.fromkeys(
        places
    ):  # distinct, since seeking back to a video's only frame fails
        video.set(cv2.CAP_PROP_POS_FRAMES, place)
        good, pixels = video.read()
        if not good:
            raise ImageError(
                f"{path}: frame {place} cannot be decoded; the video is truncated or damaged."
            )
        read[place] = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return [read[place] for place in places]


def view(image: Image.Image, number: int, seed: int, name: str) -> Image.Image:
    """View `number` of the RGB image `name`, of equal size: 0 is the image, others are slightly scaled and shifted over
    white (no flips or colour changes), determined by seed, name and number."""
    if number == 0:
        return image
    draw = random.Random(f"{seed} {name} {number}")
    scale = draw.uniform(*SCALE)
    width, height = image.size
    left = width * ((1 - scale) / 2 + draw.uniform(-SHIFT, SHIFT))
    top = height * ((1 - scale) / 2 + draw.uniform(-SHIFT, SHIFT))
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (scale, 0, left, 0, scale, top),
        resample=Image.Resampling.BILINEAR,
        fillcolor=(255, 255, 255),
    )
