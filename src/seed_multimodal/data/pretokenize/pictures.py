"""Pictures to encode: still ones, frames of videos, and several views of a picture.

Frames are read by OpenCV, from the middles of `num_frames` equal stretches, as the released pipe took them. (It gave
its transform a tensor, which the transform cannot take, so that every video was dropped; here frames are ordinary
pictures.)

Views are small scalings and shifts over white, which keep labels, colours and left/right true. A view depends on the
seed, the picture and the view's number only, so it is the same whatever else is encoded with it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from seed_multimodal.errors import ImageError

SCALE = (1 / 1.08, 1 / 0.88)  # of the window: below 1 the picture grows
SHIFT = 0.04  # of a side


@dataclass
class Picture:
    """A picture to encode.

    Args:
        name: for errors.
        load: opens it; raises ImageError.
        key: pictures with equal keys are equal (empty: not known).
        read: a model reads it, so that it may be seen in several views; else it is one to be drawn.
        optional: a sample without it is still worth keeping.
        problem: why `load` will raise, where that is known before.
    """

    name: str
    load: Callable[[], Image.Image]
    key: str = ""
    read: bool = True
    optional: bool = False
    problem: str = ""


def frames(path: Path | None, name: str, count: int) -> list[Picture]:
    """The pictures of `count` frames of the video `name` (None: there is none); opened when the first is loaded."""
    reader = _Frames(path, name, count)
    key = "" if path is None else f"{path}@{count}:"
    problem = f"{name}: there is no such video." if path is None else ""
    return [Picture(f"{name} frame {number}", partial(reader.frame, number), key and f"{key}{number}", problem=problem)
            for number in range(count)]


def middles(total: int, count: int) -> list[int]:
    """Numbers of the frames in the middle of `count` equal stretches of `total` frames (short videos repeat some)."""
    return [min(total - 1, int((number + 0.5) * total / count)) for number in range(count)]


class _Frames:
    def __init__(self, path: Path | None, name: str, count: int) -> None:
        self.path, self.name, self.count = path, name, count
        self._read: list[Image.Image] = []

    def frame(self, number: int) -> Image.Image:
        """One of the frames, RGB.

        Raises:
            ImageError: no such file, no video, or a frame that cannot be decoded.
        """
        if not self._read:
            self._read = self._load()
        return self._read[number]

    def _load(self) -> list[Image.Image]:
        import cv2

        if self.path is None:
            raise ImageError(f"{self.name}: there is no such video.")
        video = cv2.VideoCapture(str(self.path))
        try:
            total = int(video.get(cv2.CAP_PROP_FRAME_COUNT)) if video.isOpened() else 0
            if total < 1:
                raise ImageError(f"{self.name}: not a video in a known format, or without frames.")
            places = middles(total, self.count)
            # Each frame once: seeking back to the only frame of a video fails.
            read = {place: self._frame(video, cv2, place) for place in dict.fromkeys(places)}
            return [read[place] for place in places]
        finally:
            video.release()

    def _frame(self, video: Any, cv2: Any, place: int) -> Image.Image:
        video.set(cv2.CAP_PROP_POS_FRAMES, place)
        good, pixels = video.read()
        if not good:
            raise ImageError(f"{self.name}: frame {place} cannot be decoded; the video is cut off or damaged.")
        return Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))


def view(image: Image.Image, number: int, seed: int, name: str) -> Image.Image:
    """View `number` of an RGB picture, of its size.

    Args:
        name: the picture's; pictures of one name get equal views.
    """
    if number == 0:
        return image
    draw = random.Random(f"{seed} {name} {number}")
    scale = draw.uniform(*SCALE)
    width, height = image.size
    left = width * ((1 - scale) / 2 + draw.uniform(-SHIFT, SHIFT))
    top = height * ((1 - scale) / 2 + draw.uniform(-SHIFT, SHIFT))
    return image.transform(image.size, Image.Transform.AFFINE, (scale, 0, left, 0, scale, top),
                           resample=Image.Resampling.BILINEAR, fillcolor=(255, 255, 255))
