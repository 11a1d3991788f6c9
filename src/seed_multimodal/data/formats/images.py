"""Images and captions of records in all supported encodings; a folder of images as records."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.record import (
    BadRecord,
    ByteRange,
    FileReader,
    Record,
    find_image,
    shorten,
)
from seed_multimodal.data.formats.storage import is_remote, read_all
from seed_multimodal.errors import ImageError
from seed_multimodal.images.io import ImageFunction, bytes_from_base64
from seed_multimodal.settings import nearest

RecordImage = (
    bytes | Path | ImageFunction
)  # file content, path, or a function that renders the image
IMAGE_KEYS = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bmp",
    "gif",
    "tif",
    "tiff",
    "avif",
)  # image members of shards
IMAGE_SUFFIXES = tuple(f".{key}" for key in IMAGE_KEYS)  # image files in folders
# Default keys of an image and its caption: ours first, then those of Hugging Face's tables.
IMAGE_FIELDS = ("image", "file_name", *IMAGE_KEYS)
CAPTION_FIELDS = ("caption", "text")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


def image_field(fields: Mapping[str, Any], key: str | None) -> Any:
    """The value under `key`, by default under the first of `IMAGE_FIELDS` that is set; None: none."""
    return next(
        (fields[one] for one in ((key,) if key else IMAGE_FIELDS) if fields.get(one) is not None),
        None,
    )


def missing_image(record: Record, key: str | None = None) -> BadRecord:
    """The error for a record without an image."""
    where = (
        f"no .{', .'.join(IMAGE_KEYS)} member"
        if in_tar(record)
        else missing_key_text(key or "image", record.fields)
    )
    return BadRecord("missing image", f"{record.location}: has no image: {where}.")


def in_tar(record: Record) -> bool:
    """Whether the record is a sample of a tar."""
    return record.location.startswith(f"{record.file}: sample ")


def missing_key_text(key: str, item: Mapping[str, Any]) -> str:
    """Error text with the nearest key, or the existing keys."""
    keys = ", ".join(sorted(map(str, item))[:8]) or "no keys"
    return f"nothing under key {key!r}{nearest(key, set(item) - {key}) or f' (it has {keys})'}"


def record_image(value: Any, record: Record, root: str | Path | None = None) -> RecordImage:
    """The image that a field names, as bytes, base64 text, a path, `{"bytes": …, "path": …}` (Hugging Face's tables) or
    a function that renders it; paths are relative to `root`, else to the record's file, then the current folder. Raises
    BadRecord: none of these; ImageError: missing file or invalid base64."""
    if callable(value):
        drawn: ImageFunction = value
        return drawn
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise BadRecord(
            "wrong type", f"{record.location}: image value {shorten(value)} is not a path."
        )
    if value.startswith("data:"):
        return bytes_from_base64(value, record.location)
    path = find_image(value, root, record.file)
    if path is None and _BASE64.fullmatch(value):
        return bytes_from_base64(value, record.location)
    folder = str(root) if root is not None else record.file.rpartition("/")[0]
    if path is None and is_remote(folder) and "://" not in value:
        return read_all(f"{folder.rstrip('/')}/{value.lstrip('/')}")
    if path is None:
        where = f"below {root}" if root is not None else "next to its list or in the current folder"
        why = "is a URL, not a file; download it first" if "://" in value else f"not found {where}"
        shown = value[:200].encode("utf-8", "replace").decode()
        raise ImageError(f"{record.location}: image {shown} {why}.")
    return path


def captions(fields: Mapping[str, Any], key: str | None, where: str) -> list[str]:
    """The text or texts under `key`, by default under the first of `CAPTION_FIELDS` that is set. Raises BadRecord:
    missing, blank or of another type."""
    names = (key,) if key else CAPTION_FIELDS
    value = next((fields[one] for one in names if fields.get(one) is not None), None)
    if value in (None, []):
        raise BadRecord(
            "missing key",
            f"{where}: has no caption: no .txt, and {missing_key_text(names[0], fields)}.",
        )
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in found):
        raise BadRecord(
            "wrong type",
            f"{where}: its caption is {shorten(value)}, not a text or a list of texts.",
        )
    if not all(text.strip() for text in found):
        raise BadRecord("empty text", f"{where}: its caption is empty.")
    return found


def text_member(record: Record, files: FileReader, *, keep_whitespace: bool = False) -> str | None:
    """The text of a record's .txt, stripped unless `keep_whitespace`; None if absent. Raises BadRecord."""
    data = record.member("txt", files=files)
    if data is None:
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord(
            "malformed text", f"{record.location}: its .txt is not UTF-8 ({error.reason})."
        ) from None
    if not text.strip():
        raise BadRecord("empty text", f"{record.location}: its .txt is empty.")
    return text if keep_whitespace else text.strip()


class ImageFolder:
    """The images below a folder by index; hidden files are skipped."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @cached_property
    def images(self) -> list[Path]:
        """All images, sorted by name."""
        return sorted(
            path
            for path in self.path.glob("**/*")
            if path.suffix.lower() in IMAGE_SUFFIXES
            and not path.name.startswith(".")
            and path.is_file()
        )

    @property
    def sizes(self) -> Sequence[int]:
        """One shard with all images."""
        return [len(self.images)]

    def locate(self, row: int) -> Record:
        """A record with the image's path under `image`, and members `txt` and `json` if these files exist."""
        path = self.images[row]
        record = Record(
            path.relative_to(self.path).as_posix(),
            str(path),
            {"image": str(path.resolve())},
            file=str(path),
        )
        for extension in ("txt", "json"):
            list_file = path.with_suffix(f".{extension}")
            if list_file.is_file():
                record.members[extension] = ByteRange(str(list_file), 0, list_file.stat().st_size)
        return record
