"""Image-caption pairs by index, from shards, lists, tables, image folders and registered formats.

Images are not decoded here. Reading an unusable sample raises one of `bad_records.RECORD_FAULTS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from seed_multimodal.config import as_mapping
from seed_multimodal.data.formats.bad_records import RecordNote, broken_note
from seed_multimodal.data.formats.contents import registered_formats
from seed_multimodal.data.formats.images import (
    CAPTION_FIELDS,
    RecordImage,
    captions,
    first_value,
    image_value,
    record_image,
    text_member,
)
from seed_multimodal.data.formats.parquet import ParquetFile
from seed_multimodal.data.formats.record import (
    BadRecord,
    FieldValue,
    JsonObject,
    Record,
    RecordFields,
    shorten,
)
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.data.formats.tar import TarFile
from seed_multimodal.errors import ImageError
from seed_multimodal.settings import check_keys

LABEL_FIELDS = ("labels", "label")


@dataclass(frozen=True)
class Pair:
    """An unread image and its captions."""

    key: str
    location: str  # in errors and logs: `FILE: sample KEY`
    image: RecordImage
    captions: list[str]  # empty for sources without captions
    condition: RecordImage | None = None  # the image before the edit
    codes: FieldValue = None  # under `image_ids`, as of pre-tokenizing
    labels: FieldValue = None  # under `labels` or `label`: classes by name, a list, or one class


@dataclass(frozen=True)
class PairKeys:
    """Keys of a pair in a record.

    image_root: folder of the listed images; None: that of the list, else the current one.
    image_key: of lists, tables and .json members; None: the first of `IMAGE_FIELDS` that is set.
    caption_key: as `image_key` (`top_caption` for LAION-COCO); None: of `CAPTION_FIELDS`.
    captioned: False: captions are not read.
    condition_key: of the image before the edit (`source_image`); None: no edits.
    """

    image_root: str | Path | None = None
    image_key: str | None = None
    caption_key: str | None = None
    captioned: bool = True
    condition_key: str | None = None


class Pairs:
    """Pairs of files of any format; arguments as of `records.open_records`, and `PairKeys`.

    tar                     KEY.jpg with its caption in KEY.json, else in KEY.txt
    json, jsonl, parquet    an image (see `images.record_image`) and a caption
    folder                  images with KEY.txt or KEY.json next to them

    `shard_sizes`: samples of each shard; None for lists and folders, whose reads need not be local.
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path] | None,
        format: str = "auto",
        *,
        cache: str | bool | None = None,
        options: JsonObject | None = None,
        **keys: Any,
    ) -> None:
        self._records = open_records(files, format=format, cache=cache, options=options)
        record_files = self._records.record_files
        # A registered format may name its keys.
        format_keys = getattr(record_files[0], "pair_keys", {})
        self.keys = PairKeys(**{**format_keys, **keys})
        in_shards = any(isinstance(file, TarFile | ParquetFile) for file in record_files)
        self.shard_sizes = self._records.shard_sizes if in_shards else None
        self.check_usable()

    def __len__(self) -> int:
        return len(self._records)

    def broken(self, index: int, error: Exception) -> RecordNote:
        """A sample whose `read`, or use, raised one of `RECORD_FAULTS`."""
        return broken_note(error, self._records.locate(index).location)

    def checksum(self) -> int:
        """Of the files."""
        return self._records.checksum

    def key(self, index: int) -> str:
        """The sample's key, item, line or row in its file."""
        return self._records.locate(index).key

    def read(self, index: int) -> Pair:
        """One sample. Raises one of `RECORD_FAULTS`; ImageError: its image is missing."""
        keys = self.keys
        record = self._records.locate(index).parsed()
        captions = self._captions(record) if keys.captioned else []
        value = image_value(record, keys.image_key)
        image = record_image(value, record, keys.image_root)
        condition = None
        if keys.condition_key is not None:
            value = image_value(record, keys.condition_key, of_member=False)
            condition = record_image(value, record, keys.image_root)
        labels = first_value(record.fields, None, LABEL_FIELDS)
        codes = record.fields.get("image_ids")
        return Pair(record.key, record.location, image, captions, condition, codes, labels)

    def _captions(self, record: Record) -> list[str]:
        """Captions of the record's fields, else of its .txt."""
        caption_key = self.keys.caption_key
        if first_value(record.fields, caption_key, CAPTION_FIELDS) is None:
            text = text_member(record)
            if text is not None:
                return [text]
        return captions(record, caption_key)

    def check_usable(self, *, captioned: bool = False) -> None:
        """Raise the first sample's error if none of the first ones is usable.

        captioned: only one with a caption is.
        """

        def read(index: int) -> None:
            try:
                pair = self.read(index)
            except ImageError:
                return  # the image may still be missing
            if captioned and not pair.captions:
                raise no_caption(pair)

        self._records.check_usable(read)


def no_caption(pair: Pair) -> BadRecord:
    """The error of a sample that needs a caption."""
    return BadRecord("no caption", f"{pair.location}: has no caption.")


def open_pairs(spec: Mapping[str, Any], captioned: bool = True) -> Pairs:
    """Open a configured source.

    spec: `format`, `files`, `cache` and `PairKeys`; of a registered format `format`, `files`,
        `captioned`, and its options, also under `format_options`.
    captioned: default of this key.

    Raises ConfigError, DataError.
    """
    options = as_mapping(spec, "data")
    format = options.pop("format", "auto")
    files = options.pop("files", None)
    format_options = options.pop("format_options", {})
    if format in registered_formats():
        # It may have no captions either.
        keys = {} if options.pop("captioned", captioned) else {"captioned": False}
        return Pairs(files, format, options={**options, **format_options}, **keys)
    names = [key.name for key in fields(PairKeys)]
    check_keys(options, ["files", "cache", *names], f"data of format {format}")
    keys = {"captioned": captioned, **options}
    return Pairs(files, format, options=format_options, **keys)


# ---- filters of web-scale pairs; as in the original, an unknown value never drops a sample


def shape_problem(
    size: tuple[float, float], min_resolution: float | None, min_aspect: float | None
) -> str:
    """Why an image of (width, height) is dropped, or "".

    min_resolution: of the shorter side, in pixels.
    min_aspect: height / width must be in [min_aspect, 1 / min_aspect].
    """
    width, height = size
    if min_resolution is not None and min(size) < max(min_resolution, 1):
        return "resolution"
    if min_aspect and not min_aspect <= height / width <= 1 / min_aspect:
        return "aspect ratio"
    return ""


def similarity_problem(metadata: RecordFields, threshold: float | None) -> str:
    """Why a pair with this caption-image similarity is dropped, or "".

    The similarity is the maximum of `all_similarities`, else `similarity`, `score` or `SCORE`.
    Raises BadRecord: it is not a number.
    """
    similarities = metadata.get("all_similarities")
    if not isinstance(similarities, list | tuple) or not similarities:
        scores = [metadata.get(key) for key in ("similarity", "score", "SCORE")]
        similarities = [score for score in scores if score is not None][:1]
    if threshold is None or not similarities:
        return ""
    try:
        similarity = max(map(float, similarities))
    except (TypeError, ValueError):
        raise BadRecord(
            "wrong type", f"similarity: must be a number, not {shorten(similarities)}."
        ) from None
    return "" if similarity >= threshold else "similarity"
