"""Images and captions of records in all supported encodings; a folder of images as records."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path

from seed_multimodal.data.formats.contents import IMAGE_KEYS as IMAGE_KEYS
from seed_multimodal.data.formats.contents import IMAGE_SUFFIXES, sniff
from seed_multimodal.data.formats.record import (
    BadRecord,
    FieldValue,
    Record,
    RecordFields,
    as_list,
    shorten,
)
from seed_multimodal.data.formats.storage import DataFile, is_remote, list_files, read_all
from seed_multimodal.disk import is_file, read_patiently
from seed_multimodal.errors import ImageError
from seed_multimodal.images.io import ImageFunction, read_string
from seed_multimodal.settings import nearest

# An unread image: file content, path, or a function that renders it.
RecordImage = bytes | Path | ImageFunction
# Default keys of an image and its caption: ours first, then those of Hugging Face's tables.
IMAGE_FIELDS = ("image", "file_name", *IMAGE_KEYS)
CAPTION_FIELDS = ("caption", "text")


def first_value(fields: RecordFields, key: str | None, defaults: Iterable[str]) -> FieldValue:
    """The value under `key`, by default under the first of `defaults` that is set; or None."""
    for name in (key,) if key else defaults:
        value = fields.get(name)
        if value is not None:
            return value
    return None


def image_value(record: Record, key: str | None, *, of_member: bool = True) -> FieldValue:
    """The image's bytes in a tar, else the value under `key`, by default of `IMAGE_FIELDS`.

    Raises BadRecord: there is none.
    """
    value: FieldValue = record.member(*IMAGE_KEYS) if of_member else None
    if value is None:
        value = first_value(record.fields, key, IMAGE_FIELDS)
    if value is not None:
        return value
    if in_tar(record):
        reason = f"no .{', .'.join(IMAGE_KEYS)} member, but .{', .'.join(record.members)}"
    else:
        reason = missing_key_text(key or "image", record.fields)
    raise BadRecord("missing image", f"{record.location}: has no image: {reason}.")


def in_tar(record: Record) -> bool:
    """Whether the record is a sample of a tar."""
    return record.location.startswith(f"{record.file}: sample ")


def missing_key_text(key: str, fields: RecordFields) -> str:
    """Error text about a key without a value: the nearest key, or the existing keys."""
    if key in fields:
        return f"{key!r} is empty"
    suggestion = nearest(key, set(fields) - {key})
    if not suggestion:
        keys = ", ".join(sorted(map(str, fields))[:8])
        suggestion = f" (it has {keys or 'no keys'})"
    return f"nothing under key {key!r}{suggestion}"


def record_image(value: FieldValue, record: Record, root: str | Path | None) -> RecordImage:
    """The image that a field names.

    value: bytes, base64 text, a path, `{"bytes": …, "path": …}` (Hugging Face's tables), or a
        function that renders it.
    root: base of relative paths; by default the folder of the record's file, then the current one.

    Raises BadRecord: none of these; ImageError: missing file or invalid base64.
    """
    # 1. The content itself.
    if callable(value):
        function: ImageFunction = value
        return function
    if isinstance(value, Mapping):
        content = value.get("bytes")
        if content is None:
            content = value.get("path")
        value = content
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise BadRecord(
            "wrong type", f"{record.location}: image value {shorten(value)} is not a path."
        )

    # 2. A local file, or text, which may look like a path.
    path = find_image(value, root, record.file)
    if path is not None:
        return path
    is_url = "://" in value
    if not is_url:
        content = read_string(value, record.location)
        if isinstance(content, bytes):
            return content

    # 3. A remote file.
    folder, _, _ = record.file.rpartition("/")
    if root is not None:
        folder = str(root)
    if is_remote(folder) and not is_url:
        return read_all(f"{folder.rstrip('/')}/{value.lstrip('/')}")

    if is_url:
        reason = "is a URL, not a file; download it first"
    elif root is not None:
        reason = f"not found below {root}"
    else:
        reason = (
            "not found next to its list or in the current folder; set image_root (--images of "
            "evaluations, image_dir in training of language models) to its folder"
        )
    printable = value[:200].encode("utf-8", "replace").decode()
    raise ImageError(f"{record.location}: image {printable} {reason}.")


def find_image(
    path: str, root: str | Path | None = None, list_file: str | Path | None = None
) -> Path | None:
    """The file of an image, or None.

    root: folder of the images; by default the folder of `list_file`, then the current one.

    As in SEED-X's lists, a leading slash may mean that folder.
    """
    if root is not None:
        folders = [Path(root).expanduser()]
    else:
        folders = [Path(list_file).parent if list_file else Path(), Path()]
    path = os.path.expanduser(path)
    # Lists of Windows have backslashes.
    for name in dict.fromkeys((path, path.replace("\\", "/"))):
        candidates = [folder / name.lstrip("/") for folder in folders]
        if Path(name).is_absolute():
            candidates.insert(0, Path(name))
        for candidate in candidates:
            if is_file(candidate):
                return candidate
    # Windows and macOS ignore case. An image as base64 text has no full stop.
    if "." not in path:
        return None
    matches = filter(None, map(_ignoring_case, candidates))
    return next(filter(is_file, matches), None)


def _ignoring_case(path: Path) -> Path | None:
    """The path whose names differ at most in case."""
    found = Path(path.anchor)
    for name in path.relative_to(path.anchor).parts:
        if not os.path.exists(found / name):
            name = _names(found).get(_comparable(name), "")
            if not name:
                return None
        found /= name
    return found


@lru_cache(64)
def _names(folder: Path) -> dict[str, str]:
    """The names in a folder by their `_comparable` form."""
    try:
        names = read_patiently(folder, lambda: os.listdir(folder))
        return {_comparable(name): name for name in names}
    except OSError:
        return {}


def _comparable(name: str) -> str:
    """A name in lower case; macOS writes accents as characters of their own."""
    return unicodedata.normalize("NFC", name.lower())


def captions(record: Record, key: str | None) -> list[str]:
    """The text or texts under `key` of a record, by default of `CAPTION_FIELDS`.

    Raises BadRecord: missing, blank or of another type.
    """
    location = record.location
    value = first_value(record.fields, key, CAPTION_FIELDS)
    if value is None or value == []:
        reason = f"no .txt, and {missing_key_text(key or CAPTION_FIELDS[0], record.fields)}"
        if in_tar(record) and not record.fields:
            reason = (
                f"no .txt or .json member, but .{', .'.join(record.members)}; the members of a "
                "sample must follow each other (tar --sort=name)"
            )
        elif location == record.file:  # of a folder
            reason = "no .txt or .json beside it; a table of captions must be named metadata.csv"
        raise BadRecord("missing key", f"{location}: has no caption: {reason}.")
    texts = as_list(value)
    if not all(isinstance(text, str) for text in texts):
        raise BadRecord(
            "wrong type",
            f"{location}: its caption is {shorten(value)}, not a text or a list of texts.",
        )
    if not all(text.strip() for text in texts):
        raise BadRecord("empty text", f"{location}: its caption is empty.")
    return texts


def text_member(record: Record, *, keep_whitespace: bool = False) -> str | None:
    """The text of a record's .txt, stripped unless `keep_whitespace`; None if absent.

    Raises BadRecord: not UTF-8, or blank.
    """
    data = record.member("txt")
    if data is None:
        return None
    try:
        text = data.decode("utf-16" if sniff(data) == "utf-16" else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord(
            "malformed text", f"{record.location}: its .txt is not UTF-8 ({error.reason})."
        ) from None
    if not text.strip():
        raise BadRecord("empty text", f"{record.location}: its .txt is empty.")
    return text if keep_whitespace else text.strip()


class ImageFolder:
    """The images below a folder by index; hidden files are skipped."""

    def __init__(self, file: DataFile) -> None:
        self.path = Path(file.path)

    @cached_property
    def files(self) -> list[str]:
        """All files, sorted by name."""
        return list_files(self.path)

    @cached_property
    def images(self) -> list[str]:
        """All images, sorted by name."""
        return [path for path in self.files if path.lower().endswith(IMAGE_SUFFIXES)]

    @property
    def sizes(self) -> Sequence[int]:
        """One shard with all images."""
        return [len(self.images)]

    def locate(self, row: int) -> Record:
        """A record with the image's path under `image`.

        It has members `txt` and `json` if these files exist.
        """
        path = Path(self.images[row])
        key = path.relative_to(self.path).as_posix()
        record = Record(key, str(path), {"image": str(path.resolve())}, file=str(path))
        for extension in ("TXT", "JSON", "txt", "json"):
            file = path.with_suffix(f".{extension}")
            if file.is_file():
                record.members[extension.lower()] = partial(read_all, file)
        return record
