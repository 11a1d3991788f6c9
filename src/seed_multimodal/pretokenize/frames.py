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
    """Frame `index` of `count` of a video, as `images.io.ImageFunction`.

    Raises ImageError when it is called.
    """

    path: str
    count: int
    index: int

    def __call__(self) -> np.ndarray:
        return read_frames(self.path, self.count)[self.index]


@functools.lru_cache(maxsize=1)
def read_frames(path: str, count: int) -> list[np.ndarray]:
    """Frames uint8 [H, W, 3] at the centres of `count` equal segments of a video, as in the
    original (short videos repeat frames). Raises ImageError.
    """
    import cv2

    video = cv2.VideoCapture(path)
    total = int(video.get(cv2.CAP_PROP_FRAME_COUNT))  # 0 if it cannot be opened
    if total < 1:
        raise ImageError(f"{path}: not a video in a known format, or without frames.")
    positions = [min(total - 1, int((index + 0.5) * total / count)) for index in range(count)]

    # Each frame is read once, since seeking back to a video's only frame fails.
    frames: dict[int, np.ndarray] = {}
    for position in dict.fromkeys(positions):
        video.set(cv2.CAP_PROP_POS_FRAMES, position)
        is_read, pixels = video.read()
        if not is_read:
            raise ImageError(
                f"{path}: frame {position} cannot be decoded; the video is truncated or damaged."
            )
        frames[position] = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return [frames[position] for position in positions]


def augmented_view(image: Image.Image, index: int, seed: int, name: str) -> Image.Image:
    """View `index` of the RGB image `name`, of equal size.

    View 0 is the image, others are slightly scaled and shifted over white (no flips or colour
    changes), determined by seed, name and index.
    """
    if index == 0:
        return image
    rng = random.Random(f"{seed} {name} {index}")
    scale = rng.uniform(*SCALE)
    width, height = image.size
    left = width * ((1 - scale) / 2 + rng.uniform(-SHIFT, SHIFT))
    top = height * ((1 - scale) / 2 + rng.uniform(-SHIFT, SHIFT))
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (scale, 0, left, 0, scale, top),
        resample=Image.Resampling.BILINEAR,
        fillcolor=(255, 255, 255),
    )
