"""Images to encode: still ones, frames of videos, and several views of an image."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from seed_multimodal.errors import ImageError

SCALE = (1 / 1.08, 1 / 0.88)  # of the window: below 1 the picture grows
SHIFT = 0.04  # of a side


@dataclass
class Picture:
    """An image to encode.

    Attributes:
        name: for errors.
        load: opens it; raises ImageError.
        key: images with equal keys are equal (empty: not known).
        read: a model reads it, so it may have several views; else it is one to be drawn.
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
    """The images of `count` frames of the video `name`, from the middles of as many equal stretches, as in the
    original; it is opened when the first is loaded. `path` None: it is not there."""
    read = functools.cache(functools.partial(_read_frames, path, name, count))
    problem = "" if path else f"{name}: there is no such video."
    return [Picture(f"{name} frame {number}", lambda number=number: read()[number],  # type: ignore[misc]
                    f"{path}@{count}:{number}" if path else "", problem=problem) for number in range(count)]


def middles(total: int, count: int) -> list[int]:
    """Numbers of the frames in the middle of `count` equal stretches of `total` frames (short videos repeat some)."""
    return [min(total - 1, int((number + 0.5) * total / count)) for number in range(count)]


def _read_frames(path: Path | None, name: str, count: int) -> list[Image.Image]:
    import cv2

    if path is None:
        raise ImageError(f"{name}: there is no such video.")
    video = cv2.VideoCapture(str(path))
    total = int(video.get(cv2.CAP_PROP_FRAME_COUNT)) if video.isOpened() else 0
    if total < 1:
        raise ImageError(f"{name}: not a video in a known format, or without frames.")
    read: dict[int, Image.Image] = {}
    places = middles(total, count)
    for place in dict.fromkeys(places):  # each once: seeking back to the only frame of a video fails
        video.set(cv2.CAP_PROP_POS_FRAMES, place)
        good, pixels = video.read()
        if not good:
            raise ImageError(f"{name}: frame {place} cannot be decoded; the video is cut off or damaged.")
        read[place] = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
    return [read[place] for place in places]


def view(image: Image.Image, number: int, seed: int, name: str) -> Image.Image:
    """View `number` of the RGB image called `name`, of its size: 0 is the image, others are small scalings and shifts
    over white, which keep labels, colours and left/right true, and depend on seed, name and number only."""
    if number == 0:
        return image
    draw = random.Random(f"{seed} {name} {number}")
    scale = draw.uniform(*SCALE)
    width, height = image.size
    left = width * ((1 - scale) / 2 + draw.uniform(-SHIFT, SHIFT))
    top = height * ((1 - scale) / 2 + draw.uniform(-SHIFT, SHIFT))
    return image.transform(image.size, Image.Transform.AFFINE, (scale, 0, left, 0, scale, top),
                           resample=Image.Resampling.BILINEAR, fillcolor=(255, 255, 255))
