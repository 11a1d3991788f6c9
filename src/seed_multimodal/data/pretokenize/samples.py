"""Samples of the input: records with access to their texts and images."""

from __future__ import annotations

from collections.abc import Mapping
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
from seed_multimodal.data.pretokenize.input_settings import InputSettings
from seed_multimodal.data.pretokenize.pictures import Picture
from seed_multimodal.errors import ImageError
from seed_multimodal.images.io import open_image


class Dropped(Exception):
    """A sample that is not wanted (a filter, nothing to learn from); `str` is the reason it is counted under."""


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
            raise no_picture(self._record, key) if in_tar(self._record) else self._no_picture()
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

    def _no_picture(self) -> BadRecord:
        return BadRecord("missing picture",
                         f"{self.where}: has no picture where one is looked for ({self.known_keys()}).")

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
            return Picture(self.where, partial(_raise, error), problem=str(error), **options)
        if not isinstance(found, Path):
            key = repr(value) if callable(value) else ""
            return Picture(self.where, partial(open_image, found, name=self.where), key, **options)
        name = f"{self.where}: {value['path'] if isinstance(value, Mapping) else value}"
        if self.where == self._record.file:
            name = self.where  # of a folder: the record is the picture
        return Picture(name, partial(open_image, found, name=name), str(found), **options)

    def path(self, value: str) -> Path | None:
        """The file a field names, or None."""
        return find_image(value, self.settings.image_root, self._record.file)


def _raise(error: ImageError) -> Image.Image:
    raise error
