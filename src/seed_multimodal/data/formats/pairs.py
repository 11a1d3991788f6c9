"""Image-caption pairs by number, as a view of records: shards, lists, tables, image folders, registered formats.

Nothing is decoded here. A sample that cannot be used raises one of `SAMPLE_FAULTS` when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seed_multimodal.data.formats.images import (
    CAPTION_FIELDS,
    IMAGE_KEYS,
    StoredPicture,
    captions,
    image_field,
    no_picture,
    stored_picture,
    text_member,
)
from seed_multimodal.data.formats.parquet import KEPT, ParquetFile
from seed_multimodal.data.formats.record import Record
from seed_multimodal.data.formats.sources import open_records, registered
from seed_multimodal.data.formats.tar import TarFile
from seed_multimodal.errors import DataError, ImageError
from seed_multimodal.settings import check_keys

SAMPLE_FAULTS = (ImageError, DataError)  # what a sample that cannot be used raises: named, skipped and counted
PROBED = 20  # samples that are looked at before a source is refused


@dataclass(frozen=True)
class Pair:
    """An image, unread, and its captions."""

    key: str
    name: str  # in errors and logs: `file: sample`
    image: StoredPicture
    captions: list[str]  # none where the source is not captioned
    condition: StoredPicture | None = None  # the image that `image` is an edit of


@dataclass(frozen=True)
class PairKeys:
    """Where a pair stands in a record.

    Attributes:
        image_root: folder of the images that lists name; None: that of the list, else the current one.
        image_key, caption_key: keys of lists, tables and .json members (`top_caption` for LAION-COCO); None: the first
            of `images.IMAGE_FIELDS` and `CAPTION_FIELDS` that is there.
        captioned: False: images are enough, and captions are not read.
        condition_key: key of the image that each image is an edit of (`source_image`); None: there is none.
    """

    image_root: str | Path | None = None
    image_key: str | None = None
    caption_key: str | None = None
    captioned: bool = True
    condition_key: str | None = None


class Pairs:
    """Pairs of files of any kind; arguments as of `sources.open_records`, and `keys` of `PairKeys`.

    tar                     KEY.jpg with its caption in KEY.json, else in KEY.txt
    json, jsonl, parquet    an image (a path, its bytes, base64 text, `{"bytes": …, "path": …}`) and a caption
    folder                  images with KEY.txt or KEY.json beside them

    `shard_sizes` (samples of each shard or row group; None: there are only lists and folders) lets the training order
    keep reads near each other; `shuffle_block`: so many rows of tables fit into the memory for them (None: no table).
    """

    def __init__(self, files: str | Path | Sequence[str | Path] | None, format: str = "auto", *,
                 cache: str | None = None, options: Mapping[str, Any] | None = None, **keys: Any) -> None:
        self._records = open_records(files, format=format, cache=cache, options=options, needs_json=False,
                                     pictures=True)
        parts = self._records.parts
        self.keys = PairKeys(**getattr(parts[0], "pair_keys", keys))
        tables = [part for part in parts if isinstance(part, ParquetFile)]
        near = any(isinstance(part, TarFile | ParquetFile) for part in parts)
        self.shard_sizes = self._records.shard_sizes if near else None
        self.shuffle_block = KEPT // 3 // max(1, *(table.bytes_of_row for table in tables)) if tables else None
        self._check_usable()

    def __len__(self) -> int:
        return len(self._records)

    def key(self, index: int) -> str:
        """The sample's place in its file: key, item, line or row."""
        return self._records.locate(index).key

    def read(self, index: int) -> Pair:
        """One sample. Raises BadRecord, or ImageError: its image is not there."""
        keys, files = self.keys, self._records.open_files
        record = self._records.locate(index).parsed(files)
        captions = self._captions(record) if keys.captioned else []
        image: StoredPicture | None = record.member(*IMAGE_KEYS, files=files)
        image = self._stored(record, keys.image_key) if image is None else image
        condition = None if keys.condition_key is None else self._stored(record, keys.condition_key)
        return Pair(record.key, record.where, image, captions, condition)

    def _stored(self, record: Record, key: str | None) -> StoredPicture:
        value = image_field(record.fields, key)
        if value is None:
            raise no_picture(record, key)
        return stored_picture(value, record, self.keys.image_root)

    def _captions(self, record: Record) -> list[str]:
        key = self.keys.caption_key
        if all(record.fields.get(one) is None for one in ((key,) if key else CAPTION_FIELDS)):
            text = text_member(record, self._records.open_files)
            if text is not None:
                return [text]
        return captions(record.fields, key, record.where)

    def _check_usable(self) -> None:
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


def open_pairs(spec: Mapping[str, Any]) -> Pairs:
    """The source a configuration describes: `format`, `files`, `cache` and those of `PairKeys`, or options of a
    registered format. Raises ConfigError, DataError."""
    options: Any = OmegaConf.to_container(spec, resolve=True) if isinstance(spec, DictConfig) else dict(spec)
    kind = options.pop("format", "auto")
    if kind in registered():
        return Pairs(options.pop("files", None), kind, options=options)
    check_keys(options, ["files", "cache", *(one.name for one in fields(PairKeys))], f"data of format {kind}")
    return Pairs(options.pop("files", None), kind, **options)
