"""Image-caption pairs by number, as a view of records: shards, lists, tables, image folders, registered formats.

    source = open_pairs({"format": "webdataset", "pattern": "cc3m/{00000..00331}.tar"})
    source.read(17)                # Pair(key, name, image, captions)

Nothing is decoded here. A sample without image or caption, or whose members cannot be read, raises one of
`SAMPLE_FAULTS` when it is read: callers name, skip and count it (`stream.mixture`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from seed_multimodal.data.formats.images import (
    IMAGE_KEYS,
    StoredPicture,
    captions,
    has_caption,
    image_field,
    in_tar,
    no_picture,
    stored_picture,
    text_member,
)
from seed_multimodal.data.formats.parquet import KEPT, ParquetFile
from seed_multimodal.data.formats.record import BadRecord, FileReader, Record
from seed_multimodal.data.formats.sources import FileRecords, find_files, open_file, open_registered, registered
from seed_multimodal.data.formats.tar import TarFile
from seed_multimodal.errors import ConfigError, DataError, ImageError
from seed_multimodal.settings import check_keys, nearest

SAMPLE_FAULTS = (ImageError, DataError)  # what a sample that cannot be used raises: named, skipped and counted
FORMATS = ("auto", "json", "jsonl", "parquet", "folder", "webdataset")
PROBED = 20  # samples that are looked at before a source is refused


@dataclass(frozen=True)
class Pair:
    """The picture's file (bytes, or where it lies) or what draws it, and the captions of a record (at least one, but
    of sources that are not captioned).

    `name` identifies it in errors and logs: `file: sample`. `condition`: the picture that `image` is an edit of.
    """

    key: str
    name: str
    image: StoredPicture
    captions: list[str]
    condition: StoredPicture | None = None


class PairSource(Protocol):
    """Pairs by number; what is wrong with one is a `SAMPLE_FAULTS` of its `read`."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The sample's key, without reading it."""

    def read(self, index: int) -> Pair:
        """One sample."""


class PairReader:
    """What makes a pair of a record.

    Args:
        image_root: folder of the images that lists name; None: paths count from their list's folder, else from the
            current one.
        image_key, caption_key: keys of lists, tables and .json members (`top_caption` for LAION-COCO); None: the first
            of `images.IMAGE_FIELDS` and `CAPTION_FIELDS` that is there.
        image_keys: extensions of a tar's images, the preferred first.
        caption_file: json or txt: the only member looked at for a caption; None: .json, and .txt where that has none.
        captioned: False: images are enough, and captions are not read.
        condition_key: key of the image that each image is an edit of (`source_image`); None: there is none.
    """

    def __init__(self, image_root: str | Path | None = None, image_key: str | None = None,
                 image_keys: str | Sequence[str] = IMAGE_KEYS, caption_key: str | None = None,
                 caption_file: str | None = None, captioned: bool = True, condition_key: str | None = None) -> None:
        if caption_file not in (None, "json", "txt"):
            raise ConfigError(f"caption_file must be json or txt, not {caption_file!r}.")
        self.captioned, self.condition_key = captioned, condition_key
        image_keys = (image_keys,) if isinstance(image_keys, str) else tuple(image_keys)
        self.image_keys = tuple(key.lower().lstrip(".") for key in image_keys)
        self.image_root, self.image_key, self.caption_key = image_root, image_key or "", caption_key or ""
        self.caption_files = (caption_file,) if caption_file else ("json", "txt")
        self.columns = {"image": self.image_keys, **{name: (name,) for name in self.caption_files}}

    def __call__(self, record: Record, files: FileReader) -> Pair:
        """The pair of a record, which may be unread; of a tar its members are named as in `columns`.

        Raises:
            BadRecord: it is damaged, names no picture, or has no usable caption. ImageError: its picture is not there.
        """
        read = record.parsed(files)
        captions = self._captions(read, files) if self.captioned else []
        image: StoredPicture | None = read.member("image", files=files)
        if image is None:
            value = image_field(read.fields, self.image_key)
            if value is None:
                raise no_picture(read, self.image_key, self.image_keys)
            image = stored_picture(value, read, self.image_root)
        return Pair(_key(read), read.where, image, captions, self._condition(read))

    def _condition(self, record: Record) -> StoredPicture | None:
        if self.condition_key is None:
            return None
        value = record.fields.get(self.condition_key)
        if value is None:
            raise no_picture(record, self.condition_key)
        return stored_picture(value, record, self.image_root)

    def _captions(self, record: Record, files: FileReader) -> list[str]:
        if "json" not in self.caption_files or not has_caption(record.fields, self.caption_key):
            text = text_member(record, files) if "txt" in self.caption_files else None
            if text is not None:
                return [text]
            if "json" not in self.caption_files:
                raise BadRecord("missing member", f"{record.where}: has no .txt with its caption.")
        return captions(record.fields, self.caption_key, record.where)


class Pairs:
    """Pairs of files of any kind: shards, lists, tables, folders of images, registered formats.

    | format | a sample |
    | --- | --- |
    | tar (`webdataset`) | KEY.jpg with its caption in KEY.json, or in KEY.txt |
    | json, jsonl, parquet | an image (a path, its bytes, base64 text, `{"bytes": …, "path": …}`) and a caption |
    | folder | images with KEY.txt or KEY.json beside them |

    `files`, `format` and `cache` as of `sources.open_records`; `reading`: arguments of `PairReader`.

    `shard_sizes` (samples of each shard or row group; None: there are only lists and folders) lets the training order
    keep reads near each other; `shuffle_block`: so many rows of tables fit into the memory for them (None: no table).

    Raises:
        DataError: no such files; a file that cannot be indexed; no usable sample among the first `PROBED`.
    """

    def __init__(self, files: str | Path | Sequence[str | Path], format: str = "auto", *, cache: str | None = None,
                 **reading: Any) -> None:
        self._reader = PairReader(**reading)
        given = [files] if isinstance(files, str | Path) else list(files)
        parts = [TarFile(path, self._reader.columns) if kind == "tar" else open_file(path, kind)
                 for path, kind in find_files(given, format, pictures=True)]
        self._records = FileRecords(parts, ", ".join(map(str, given)), cache)
        tables = [part for part in parts if isinstance(part, ParquetFile)]
        near = any(isinstance(part, TarFile | ParquetFile) for part in parts)
        self.shard_sizes = self._records.shard_sizes if near else None
        self.shuffle_block = KEPT // 3 // max(1, *(table.bytes_of_row for table in tables)) if tables else None
        self._refuse_unusable()

    def __len__(self) -> int:
        return len(self._records)

    def key(self, index: int) -> str:
        """The sample's place in its file: key, item, line or row."""
        return _key(self._records.locate(index))

    def read(self, index: int) -> Pair:
        """One sample. Raises as `PairReader`."""
        return self._reader(self._records.locate(index), self._records.open_files)

    def _refuse_unusable(self) -> None:
        """Raise the first sample's error if none of `PROBED` can be used, before a training loads its model."""
        errors = []
        for index in range(min(PROBED, len(self))):
            try:
                self.read(index)
                return
            except ImageError:
                return  # files may be gone; what was read has a caption
            except DataError as error:
                errors.append(error)
        raise errors[0]


class RegisteredPairs(Pairs):
    """Pairs of a registered format (`sources.registered`); `options` go to its opener."""

    shard_sizes = shuffle_block = None

    def __init__(self, format: str, files: str | Path | None = None, **options: Any) -> None:
        file = open_registered(format, files, options)
        self._reader = PairReader(**getattr(file, "pair_keys", {}))
        self._records = FileRecords([file], format)


def open_pairs(spec: Mapping[str, Any]) -> PairSource:
    """The source a configuration describes: `format`, `files` (of webdataset also `pattern`), and the other arguments
    of `Pairs` and `PairReader`; of a registered format, `files` and its options.

    Raises:
        ConfigError: an unknown format, an unknown key (the nearest is named), or a missing one.
        DataError: as the source's class.
    """
    plain = OmegaConf.to_container(spec, resolve=True) if isinstance(spec, DictConfig) else dict(spec)
    assert isinstance(plain, dict)
    options = {str(key): value for key, value in plain.items()}
    kind = options.pop("format", None)
    if kind in registered():
        return RegisteredPairs(kind, **options)
    if kind not in FORMATS:
        known = (*FORMATS, *registered())
        raise ConfigError(f"data: format must be {', '.join(known)}, not {kind!r}{nearest(str(kind), known)}.")
    named = "pattern" if kind == "webdataset" and "files" not in options else "files"
    check_keys(options, [named, "cache", *inspect.signature(PairReader).parameters], f"data of format {kind}")
    files = options.pop(named, None)
    if not files:
        raise ConfigError(f"data of format {kind}: {named} is not given.")
    return Pairs(files, "tar" if kind == "webdataset" else kind, **options)


def _key(record: Record) -> str:
    """`item N`, `line N` or `row N`; the key of a shard's sample, the path of a folder's image."""
    place = record.where.removeprefix(f"{record.file}: ")
    return record.key if place == record.where or in_tar(record) else place
