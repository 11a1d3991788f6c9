"""Samples of the input: records with access to their texts and pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from seed_multimodal.data.formats.pictures import IMAGE_KEYS
from seed_multimodal.data.formats.record import BadRecord, Record, find_image
from seed_multimodal.data.formats.tar import OpenFiles
from seed_multimodal.data.pretokenize.pictures import Picture
from seed_multimodal.errors import ImageError
from seed_multimodal.images.encode import image_from_base64
from seed_multimodal.images.open import open_image

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


class Dropped(Exception):
    """A sample that is not wanted (a filter, nothing to learn from); `str` is the reason it is counted under."""


class Sample:
    """A record as read: `fields` (of its json), its picture and text as members of a tar, pictures that fields name.

    Args:
        image_root: folder of the pictures that fields name.

    Raises:
        BadRecord: its json is none, or the record is known to be broken.
    """

    def __init__(self, record: Record, files: OpenFiles, image_root: str | None = None) -> None:
        self._record, self._files, self._root = record.parsed(files), files, image_root
        self.where, self.fields = record.where, self._record.fields

    def picture_member(self) -> bytes | None:
        """The bytes of the picture that is a member."""
        return self._record.member(*IMAGE_KEYS, files=self._files)

    def text_member(self) -> str | None:
        """The .txt member.

        Raises:
            BadRecord: it is not UTF-8.
        """
        data = self._record.member("txt", files=self._files)
        try:
            return None if data is None else data.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise BadRecord("malformed text", f"{self.where}: its .txt is not UTF-8 ({error.reason}).") from None

    def text(self, key: str, *, required: bool = True) -> str | None:
        """The text under a key; a number counts as text (NaN as nothing), of a list of texts the most frequent one.

        Raises:
            BadRecord: another type, or nothing where something is required.
        """
        value = self.fields.get(key)
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            value = max(value, key=value.count)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value) if value == value else None  # NaN: an empty field of a table
        if value is None and not required:
            return None
        if not isinstance(value, str):
            problem = "has no text under" if value is None else f"holds a {type(value).__name__} under"
            raise BadRecord("missing key", f"{self.where}: {problem} {key!r} ({self.keys()}).")
        return value

    def keys(self) -> str:
        """The keys that the sample has, and how to name the right ones, for an error."""
        have = ", ".join(sorted(map(str, self.fields))[:8]) or "no keys"
        return f"it has {have}; name them by --fields"

    def picture(self, value: Any, **options: Any) -> Picture:
        """The picture that a field names: a path, bytes as base64 text or bytes, `{"bytes": …}`, or one of the record's
        members.

        Raises:
            BadRecord: none of these.
        """
        if isinstance(value, Mapping):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes):
            return Picture(self.where, partial(open_image, value, name=self.where), **options)
        if value is None:
            raise BadRecord("missing key", f"{self.where}: has no picture where one is looked for ({self.keys()}).")
        if not isinstance(value, str) or not value:
            raise BadRecord("missing key", f"{self.where}: a picture is {value!r:.60}, not a path.")
        own = self._record.members.get(value)
        if isinstance(own, bytes):
            name = f"{self._record.file}: picture {value}"
            return Picture(name, partial(open_image, own, name=name), f"own:{value}", **options)
        path = None if value.startswith("data:") else self.path(value)
        if path is not None:
            name = f"{self.where}: {value}"
            return Picture(name, partial(open_image, path, name=name), str(path), **options)
        if value.startswith("data:") or _BASE64.fullmatch(value):
            return Picture(self.where, partial(image_from_base64, value, name=self.where), **options)
        return Picture(self.where, partial(_missing, self.where, value), **options)

    def path(self, value: str) -> Path | None:
        """The file a field names, or None."""
        return find_image(value, self._root, self._record.file)


def _missing(where: str, value: str) -> Image.Image:
    raise ImageError(f"{where}: there is no picture {value[:200]!r}.")
