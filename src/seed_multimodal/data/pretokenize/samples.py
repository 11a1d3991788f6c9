"""Samples of the input: records with access to their texts and images, frames of videos, several views of an image."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from seed_multimodal.data.formats.images import (
    CAPTION_FIELDS,
    IMAGE_FIELDS,
    IMAGE_KEYS,
    captions,
    image_field,
    in_tar,
    no_picture,
    stored_picture,
    text_member,
)
from seed_multimodal.data.formats.record import BadRecord, FileReader, Record, find_image
from seed_multimodal.data.pretokenize.inputs import InputSettings
from seed_multimodal.errors import ImageError
from seed_multimodal.images.io import open_image

SCALE = (1 / 1.08, 1 / 0.88)  # of a view's window: below 1 the picture grows
SHIFT = 0.04  # of a side


class Dropped(Exception):
    """A sample that is not wanted (a filter, nothing to learn from); `str` is the reason it is counted under."""


@dataclass
class Picture:
    """An image to encode; `load` may raise ImageError."""

    name: str
    load: Callable[[], Image.Image]
    key: str = ""  # images with equal keys are equal; empty: not known
    read: bool = True  # by a model, so that it may have several views; else it is drawn
    optional: bool = False  # a sample without it is still worth keeping


class Sample:
    """A record as read: `fields` (of its json), its image and text as members of a tar, images that fields name.

    `keys`: of the fields by what they hold (`Kind.keys`). All methods raise BadRecord: what is asked for is not there.
    """

    def __init__(self, record: Record, files: FileReader, settings: InputSettings, keys: Mapping[str, str]) -> None:
        self._record, self._files = record.parsed(files), files
        self.settings, self.keys = settings, keys
        self.where, self.fields = record.where, self._record.fields

    def picture_member(self) -> bytes | None:
        """The bytes of the image that is a member."""
        return self._record.member("image", *IMAGE_KEYS, files=self._files)

    def image(self, key: str) -> Any:
        """What names the image: the member's bytes, else the value under `key` (`image`: or where else one stands)."""
        found: Any = self.picture_member()
        if found is None:
            found = image_field(self.fields, "" if key == IMAGE_FIELDS[0] else key)
        if found is None:
            raise self._no_picture(key)
        return found

    def caption(self, key: str, *, member: bool) -> str | list[str]:
        """The caption: the .txt member's (if `member`), else the text or texts under `key` (`caption`: or `text`)."""
        text = text_member(self._record, self._files) if member else None
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
        blank = isinstance(value, str) and not value.strip()
        if (value is None or blank) and not required:
            return None
        if blank:
            raise BadRecord("empty text", f"{self.where}: its {key!r} is empty.")
        if not isinstance(value, str):
            problem = "has no text under" if value is None else f"holds a {type(value).__name__} under"
            raise BadRecord("missing key", f"{self.where}: {problem} {key!r} ({self.known_keys()}).")
        return value

    def known_keys(self) -> str:
        """The keys that the sample has, and how to name the right ones, for an error."""
        have = ", ".join(sorted(map(str, self.fields))[:8]) or "no keys"
        return f"it has {have}; name them by --fields"

    def _no_picture(self, key: str = "") -> BadRecord:
        hint = "" if in_tar(self._record) else "; name the keys by --fields"
        return BadRecord("missing picture", f"{str(no_picture(self._record, key)).rstrip('.')}{hint}.")

    def picture(self, value: Any, **options: Any) -> Picture:
        """The image that a field names: a path, bytes as base64 text or bytes, `{"bytes": …}`, or one of the record's
        members."""
        own = self._record.members.get(value) if isinstance(value, str) else None
        if isinstance(own, bytes):
            name = f"{self._record.file}: picture {value}"
            return Picture(name, partial(open_image, own, name=name), f"own:{value}", **options)
        if value is None:
            raise self._no_picture()
        try:
            found = stored_picture(value, self._record, self.settings.image_root)
        except ImageError as error:
            return Picture(self.where, partial(_raise, error), **options)
        if not isinstance(found, Path):
            key = repr(value) if callable(value) else ""
            return Picture(self.where, partial(open_image, found, name=self.where), key, **options)
        name = f"{self.where}: {value['path'] if isinstance(value, Mapping) else value}"
        if self.where == self._record.file:
            name = self.where  # of a folder: the record is the picture
        return Picture(name, partial(open_image, found, name=name), str(found), **options)

    def frames(self, value: str) -> list[Picture]:
        """Images of the video that a field names; it is opened when the first of them is loaded."""
        path, count = find_image(value, self.settings.image_root, self._record.file), self.settings.num_frames
        read = functools.cache(partial(_read_frames, path, f"{self.where}: {value}", count))
        return [Picture(f"{self.where}: {value} frame {number}", lambda number=number: read()[number],  # type: ignore
                        f"{path}@{count}:{number}" if path else "") for number in range(count)]


def _raise(error: ImageError) -> Image.Image:
    raise error


def middles(total: int, count: int) -> list[int]:
    """Numbers of the frames in the middle of `count` equal stretches of `total` frames, as in the original (short
    videos repeat some)."""
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
