"""Images and captions of records, in whatever way they are stored; and a folder of images as records."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.record import BadRecord, FileReader, Place, Record, find_image, shorten
from seed_multimodal.data.formats.storage import is_remote, read_all
from seed_multimodal.errors import ImageError
from seed_multimodal.images.io import Drawing, bytes_from_base64
from seed_multimodal.settings import nearest

StoredPicture = bytes | Path | Drawing  # a file's bytes, where it lies, or what draws the picture
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")  # extensions of pictures in shards
PICTURE_ENDINGS = tuple(f".{key}" for key in IMAGE_KEYS)  # of files in folders
# Where an image and its caption stand when no key is given: ours first, then those of Hugging Face's tables.
IMAGE_FIELDS = ("image", "file_name", *IMAGE_KEYS)
CAPTION_FIELDS = ("caption", "text")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


def image_field(fields: Mapping[str, Any], key: str | None) -> Any:
    """The value under `key`, or without one under the first of `IMAGE_FIELDS` that holds something; None: none."""
    return next((fields[one] for one in ((key,) if key else IMAGE_FIELDS) if fields.get(one) is not None), None)


def no_picture(record: Record, key: str | None = None) -> BadRecord:
    """The error of a record without an image where one is looked for."""
    where = f"no .{', .'.join(IMAGE_KEYS)} member" if in_tar(record) else nothing_under(key or "image", record.fields)
    return BadRecord("missing picture", f"{record.where}: has no picture: {where}.")


def in_tar(record: Record) -> bool:
    """Whether it is a sample of a tar."""
    return record.where.startswith(f"{record.file}: sample ")


def nothing_under(key: str, item: Mapping[str, Any]) -> str:
    """A sentence with the nearest key, or the keys that there are."""
    keys = ", ".join(sorted(map(str, item))[:8]) or "no keys"
    return f"nothing under key {key!r}{nearest(key, set(item) - {key}) or f' (it has {keys})'}"


def stored_picture(value: Any, record: Record, root: str | Path | None = None) -> StoredPicture:
    """The image that a field names, as bytes, base64 text, a path, `{"bytes": …, "path": …}` (Hugging Face's tables) or
    the function that draws it; paths are relative to `root`, else to the record's file, then the current folder. Raises
    BadRecord: none of these; ImageError: there is no such file, or no base64."""
    if callable(value):
        drawn: Drawing = value
        return drawn
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise BadRecord("wrong type", f"{record.where}: a picture is {shorten(value)}, not a path.")
    if value.startswith("data:"):
        return bytes_from_base64(value, record.where)
    path = find_image(value, root, record.file)
    if path is None and _BASE64.fullmatch(value):
        return bytes_from_base64(value, record.where)
    folder = str(root) if root is not None else record.file.rpartition("/")[0]
    if path is None and is_remote(folder) and "://" not in value:
        return read_all(f"{folder.rstrip('/')}/{value.lstrip('/')}")
    if path is None:
        where = f"below {root}" if root is not None else "beside its list or in the current folder"
        why = "is an address, not a file; download it first" if "://" in value else f"is not there, {where}"
        shown = value[:200].encode("utf-8", "replace").decode()
        raise ImageError(f"{record.where}: the picture {shown} {why}.")
    return path


def captions(fields: Mapping[str, Any], key: str | None, where: str) -> list[str]:
    """The text or texts under `key`, or without one under the first of `CAPTION_FIELDS` that holds something. Raises
    BadRecord: there is none, one is blank, or it is something else."""
    names = (key,) if key else CAPTION_FIELDS
    value = next((fields[one] for one in names if fields.get(one) is not None), None)
    if value in (None, []):
        raise BadRecord("missing key", f"{where}: has no caption: no .txt, and {nothing_under(names[0], fields)}.")
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in found):
        raise BadRecord("wrong type", f"{where}: its caption is {shorten(value)}, not a text or a list of texts.")
    if not all(text.strip() for text in found):
        raise BadRecord("empty text", f"{where}: its caption is empty.")
    return found


def text_member(record: Record, files: FileReader, *, whole: bool = False) -> str | None:
    """The text of a record's .txt, without blanks around it unless `whole`; None without one. Raises BadRecord."""
    data = record.member("txt", files=files)
    if data is None:
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord("malformed text", f"{record.where}: its .txt is not UTF-8 ({error.reason}).") from None
    if not text.strip():
        raise BadRecord("empty text", f"{record.where}: its .txt is empty.")
    return text if whole else text.strip()


class PictureFolder:
    """The images of a folder and the folders in it by number; hidden files are skipped."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @cached_property
    def images(self) -> list[Path]:
        """By name."""
        return sorted(path for path in self.path.glob("**/*") if
                      path.suffix.lower() in PICTURE_ENDINGS and not path.name.startswith(".") and path.is_file())

    @property
    def sizes(self) -> Sequence[int]:
        """All images are one piece."""
        return [len(self.images)]

    def locate(self, row: int) -> Record:
        """A record with the path of the image under `image`, and members `txt` and `json` if there are such files."""
        path = self.images[row]
        record = Record(path.relative_to(self.path).as_posix(), str(path), {"image": str(path.resolve())},
                        file=str(path))
        for extension in ("txt", "json"):
            beside = path.with_suffix(f".{extension}")
            if beside.is_file():
                record.members[extension] = Place(str(beside), 0, beside.stat().st_size)
        return record
