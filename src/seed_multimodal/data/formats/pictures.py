"""Pictures in records: where a record has one, in whatever way it is stored; and a folder of pictures as records."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.record import BadRecord, Place, Record, find_image, shorten
from seed_multimodal.errors import ImageError
from seed_multimodal.images.io import Drawing, bytes_from_base64
from seed_multimodal.settings import nearest

StoredPicture = bytes | Path | Drawing  # a file's bytes, where it lies, or what draws the picture
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")  # extensions of pictures in shards
PICTURE_ENDINGS = tuple(f".{key}" for key in IMAGE_KEYS)  # of files in folders
# Where a picture and its caption stand when no key is given: ours first, then those of Hugging Face's picture folders
# (metadata.jsonl) and tables, and of shards written as tables.
IMAGE_FIELDS = ("image", "file_name", *IMAGE_KEYS)
CAPTION_FIELDS = ("caption", "text")
# How the pictures of a COCO id are named; {} is the id. Each may lie in a folder of its split's name.
_COCO_NAMES = [name for split in ("val2014", "test2015", "train2014") for name in
               (f"COCO_{split}_{{:012d}}.jpg", f"{split}/COCO_{split}_{{:012d}}.jpg")]
_COCO_NAMES += ["{:012d}.jpg", "val2017/{:012d}.jpg", "train2017/{:012d}.jpg"]
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


def image_field(fields: Mapping[str, Any], key: str = "") -> Any:
    """The value under `key`, or without one under the first of `IMAGE_FIELDS` that holds something; None: none."""
    return next((fields[one] for one in ((key,) if key else IMAGE_FIELDS) if fields.get(one) is not None), None)


def no_picture(record: Record, key: str = "", extensions: Sequence[str] = IMAGE_KEYS) -> BadRecord:
    """The error of a record without a picture where one is looked for."""
    key = key or IMAGE_FIELDS[0]
    where = f"no .{', .'.join(extensions)} member" if in_tar(record) else f"nothing under key {key!r}" \
        + other_keys(key, record.fields)
    return BadRecord("missing picture", f"{record.where}: has no picture: {where}.")


def in_tar(record: Record) -> bool:
    """Whether it is a sample of a tar."""
    return record.where.startswith(f"{record.file}: sample ")


def other_keys(key: str, item: Mapping[str, Any]) -> str:
    """What stands where `key` was looked for, or the nearest key, for a sentence."""
    if key in item:
        return f" (it is {str(item[key])[:60]!r})"
    return nearest(key, item) or f" (it has {', '.join(sorted(map(str, item))[:8]) or 'no keys'})"


def stored_picture(value: Any, record: Record, root: str | Path | None = None) -> StoredPicture:
    """The file of the picture that a field names: its bytes, or where it lies; of one that is drawn, what draws it.

    Args:
        value: bytes, base64 text, a path, `{"bytes": …, "path": …}` as Hugging Face's tables have it, or a
            function that draws it.
        root: the folder that paths are relative to; None: the folder of the record's file, then the current one.

    Raises:
        BadRecord: none of these. ImageError: there is no such file, or no base64.
    """
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
    path = find_image(_file_name(value), root, record.file)
    if path is None and _BASE64.fullmatch(value):
        return bytes_from_base64(value, record.where)
    if path is None:
        value = value.encode("utf-8", "replace").decode()
        shown = value if len(value) <= 200 else f"{value[:80]}…"
        why = "is an address, not a file; download it first" if "://" in value else \
            f"is not there, {_places(root)}"
        raise ImageError(f"{record.where}: the picture {shown} {why}.")
    return path


def find_picture(picture: int | str, root: Path | None, beside: Path, where: str) -> Path:
    """The file of a picture that a benchmark names by path or by COCO's number.

    Raises:
        ImageError: it is not there; names the first place that was tried.
    """
    names = [name.format(picture) for name in _COCO_NAMES] if isinstance(picture, int) else [picture]
    found = next(filter(None, (find_image(name, root, beside) for name in names)), None)
    if found is None:
        raise ImageError(f"{where}: its picture is not there: {root or beside.parent}/{names[0][:200]}.")
    return found


def _file_name(text: str) -> str:
    """The name with `?` for half a surrogate pair, which no file has; bytes that are no letters stay."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _places(root: str | Path | None) -> str:
    return f"below {root}" if root is not None else "beside its list or in the current folder"


class PictureFolder:
    """The pictures of a folder, at any depth (or, not `recursive`, in itself), by number; hidden files are skipped."""

    def __init__(self, path: Path, recursive: bool = True) -> None:
        self.path, self.recursive = path, recursive

    @cached_property
    def pictures(self) -> list[Path]:
        """In the order of their names."""
        return sorted(path for path in self.path.glob("**/*" if self.recursive else "*") if is_picture(path))

    @property
    def sizes(self) -> Sequence[int]:
        """All pictures are one piece."""
        return [len(self.pictures)]

    def locate(self, row: int) -> Record:
        """A record with the path of its picture under `image`, and the members `txt` and `json` if those files are
        there."""
        path = self.pictures[row]
        record = Record(path.relative_to(self.path).as_posix(), str(path), {"image": str(path.resolve())},
                        file=str(path))
        for extension in ("txt", "json"):
            beside = path.with_suffix(f".{extension}")
            if beside.is_file():
                record.members[extension] = Place(str(beside), 0, beside.stat().st_size)
        return record


def is_picture(path: Path) -> bool:
    """Whether a file has a picture's suffix and is not hidden."""
    return path.suffix.lower() in PICTURE_ENDINGS and not path.name.startswith(".") and path.is_file()
