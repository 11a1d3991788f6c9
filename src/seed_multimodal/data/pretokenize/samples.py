"""Samples of the input: records with access to their texts and images, frames of videos, several views of an image."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from seed_multimodal.data.formats.images import (
    CAPTION_FIELDS,
    IMAGE_FIELDS,
    IMAGE_KEYS,
    captions,
    image_field,
    no_picture,
    nothing_under,
    stored_picture,
    text_member,
)
from seed_multimodal.data.formats.record import BadRecord, FileReader, Record, find_image, shorten
from seed_multimodal.data.pretokenize.inputs import InputSettings
from seed_multimodal.errors import ImageError
from seed_multimodal.images.io import open_image

SCALE = (1 / 1.08, 1 / 0.88)  # of a view's window: below 1 the picture grows
SHIFT = 0.04  # of a side


class Dropped(Exception):
    """A sample that is not wanted (a filter, nothing to learn from); `str` is the reason it is counted under."""


@dataclass
class Picture:
    """An image to encode: what `images.stored_picture` reads, of a record."""

    value: Any
    record: Record
    root: str | None
    read: bool = True  # by a model, so that it may have several views; else it is drawn
    optional: bool = False  # a sample without it is still worth keeping

    @property
    def key(self) -> str:
        """The same for equal images of neighbouring records; "": not known."""
        return self.value if isinstance(self.value, str) else repr(self.value) if callable(self.value) else ""

    def load(self) -> Image.Image:
        """Read the image. Raises BadRecord, ImageError."""
        found, where = stored_picture(self.value, self.record, self.root), self.record.where
        is_listed = isinstance(found, Path) and where != self.record.file  # else the record is the image's file
        return open_image(found, name=f"{where}: {found}" if is_listed else where)


class Sample:
    """A record as read: `fields` (of its json), its image and text as members of a tar, images that fields name.

    `keys`: of the fields by what they hold (`Kind.keys`). All methods raise BadRecord: what is asked for is not there.
    """

    def __init__(self, record: Record, files: FileReader, settings: InputSettings, keys: Mapping[str, str]) -> None:
        self.record, self.files, self.settings, self.keys = record.parsed(files), files, settings, keys
        self.where, self.fields = record.where, self.record.fields

    def picture_member(self) -> bytes | None:
        """The bytes of the image that is a member."""
        return self.record.member(*IMAGE_KEYS, files=self.files)

    def image(self, key: str) -> Any:
        """What names the image: the member's bytes, else the value under `key` (`image`: or where else one stands)."""
        found: Any = self.picture_member()
        if found is None:
            found = image_field(self.fields, "" if key == IMAGE_FIELDS[0] else key)
        if found is None:
            raise no_picture(self.record, key)
        return found

    def caption(self, key: str, *, member: bool) -> str | list[str]:
        """The caption: the .txt member's (if `member`), else the text or texts under `key` (`caption`: or `text`)."""
        text = text_member(self.record, self.files) if member else None
        if text is not None:
            return text
        found = captions(self.fields, "" if key == CAPTION_FIELDS[0] else key, self.where)
        return found if len(found) > 1 else found[0]

    def text(self, key: str, *, required: bool = True) -> str | None:
        """The text under a key: also a number (NaN, like blanks, is nothing), of a list of texts the commonest one."""
        value = self.fields.get(key)
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            value = max(value, key=value.count)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value) if value == value else None  # NaN: an empty field of a table
        if value is None or isinstance(value, str) and not value.strip():
            if required:
                raise BadRecord("missing key", f"{self.where}: {nothing_under(key, self.fields)}.")
            return None
        if not isinstance(value, str):
            raise BadRecord("wrong type", f"{self.where}: {key!r} is {shorten(value)}, not a text.")
        return value

    def picture(self, value: Any, **options: Any) -> Picture:
        """The image that a field names, as `images.stored_picture` reads it; `options` of `Picture`."""
        return Picture(value, self.record, self.settings.image_root, **options)

    def frames(self, value: str) -> list[Picture]:
        """Images of the video that a field names, which is read when the first of them is."""
        path, count = find_image(value, self.settings.image_root, self.record.file), self.settings.num_frames
        if path is None:
            raise BadRecord("missing picture", f"{self.where}: there is no video {value}.")
        return [self.picture(Frame(str(path), count, number)) for number in range(count)]


@dataclass(frozen=True)
class Frame:
    """Frame `number` of `count` of a video, as `images.io.Drawing`. Raises ImageError when it is called."""

    path: str
    count: int
    number: int

    def __call__(self) -> np.ndarray:
        return read_frames(self.path, self.count)[self.number]


def middles(total: int, count: int) -> list[int]:
    """Numbers of the frames in the middle of `count` equal stretches of `total` frames, as in the original (short
    videos repeat some)."""
    return [min(total - 1, int((number + 0.5) * total / count)) for number in range(count)]


@functools.lru_cache(maxsize=1)
def read_frames(path: str, count: int) -> list[np.ndarray]:
    """`count` frames of a video, uint8 [H, W, 3]. Raises ImageError."""
    import cv2

    video = cv2.VideoCapture(path)
    total = int(video.get(cv2.CAP_PROP_FRAME_COUNT)) if video.isOpened() else 0
    if total < 1:
        raise ImageError(f"{path}: not a video in a known format, or without frames.")
    read: dict[int, np.ndarray] = {}
    places = middles(total, count)
    for place in dict.fromkeys(places):  # each once: seeking back to the only frame of a video fails
        video.set(cv2.CAP_PROP_POS_FRAMES, place)
        good, pixels = video.read()
        if not good:
            raise ImageError(f"{path}: frame {place} cannot be decoded; the video is cut off or damaged.")
        read[place] = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
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
