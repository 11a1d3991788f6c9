"""Read a built nano set: records, pictures, edit pairs, conversations.

    nano = load_nano()                 # the set in the repository, no download
    pictures = nano.images()           # uint8 [N, 64, 64, 3], same order as nano.records
    train = nano.split("train")        # indices
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from seed_multimodal.data.formats.nano import BUILD_HINT, NanoFile, find_nano
from seed_multimodal.data.formats.record import Place, Record
from seed_multimodal.data.nano.families import SPLITS
from seed_multimodal.data.nano.types import QA, Edit, NanoConversation, NanoRecord
from seed_multimodal.errors import DataError

KEYS = ("style", "family", "label", "split", "captions", "qa", "group", "subgroup", "tags", "colour")


class NanoSet:
    """A loaded nano set. Pictures are decoded once, on the first `images()`."""

    def __init__(self, file: NanoFile, records: list[NanoRecord], edits: list[Edit],
                 conversations: list[NanoConversation]) -> None:
        self.records, self.edits, self.conversations = records, edits, conversations
        self.folder, self.manifest = file.path, file.manifest
        self.size: int = file.manifest["size"]
        self._stored = file.records

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def index(self) -> dict[str, int]:
        """key -> position in `records` and `images()`."""
        return {record.key: i for i, record in enumerate(self.records)}

    @cached_property
    def _pixels(self) -> np.ndarray:
        out = np.empty((len(self.records), self.size, self.size, 3), np.uint8)
        for index in range(len(self.records)):
            out[index] = self._decoded(index)
        out.flags.writeable = False
        return out

    def images(self) -> np.ndarray:
        """All pictures, uint8 [N, size, size, 3] RGB on white, in the order of `records` (read-only, cached)."""
        return self._pixels

    def image(self, key: str) -> Image.Image:
        """One picture by key. Raises DataError for an unknown key."""
        if key not in self.index:
            raise DataError(f"{self.folder}: no picture {key!r}.")
        return Image.fromarray(self._decoded(self.index[key]))

    def picture(self, index: int) -> bytes:
        """The file (WebP) of a picture by its position in `records`."""
        data = self._stored[index].members["webp"]
        assert not isinstance(data, Place)  # read with the set
        return data

    def _decoded(self, index: int) -> np.ndarray:
        return _decode(self.picture(index), self._stored[index].where, self.size)

    def split(self, name: str) -> list[int]:
        """Indices of one split: train, val, test_concept or test_combo."""
        if name not in SPLITS:
            raise DataError(f"unknown split {name!r}; the splits are {', '.join(SPLITS)}.")
        return [i for i, record in enumerate(self.records) if record.split == name]


def load_nano(path: str | Path | None = None) -> NanoSet:
    """Load a nano set from its folder (see `find_nano` for where it looks).

    Raises:
        DataError: naming file and sample, when anything is missing, damaged or not as the manifest counts it.
    """
    file = NanoFile(find_nano(path))
    folder, found = file.path, file.records
    records = [_record(record) for record in found]
    known = {record.key for record in records}
    edits = [_edit(row, name) for row, name in _lines(folder / "edits.jsonl.gz")]
    conversations = [_conversation(row, name) for row, name in _lines(folder / "conversations.jsonl.gz")]
    for key in {k for e in edits for k in (e.source, e.target)} | {k for c in conversations for k in c.keys}:
        if key not in known:
            raise DataError(f"{folder}: an edit or conversation names picture {key!r}, which no shard holds.")
    return NanoSet(file, records, edits, conversations)


def _record(sample: Record) -> NanoRecord:
    data = dict(sample.fields)
    missing = next((key for key in KEYS if key not in data), None)
    if missing is not None:
        raise DataError(f"{sample.where}: its .json member has no key {missing!r}.")
    if data["split"] not in SPLITS:
        raise DataError(f"{sample.where}: unknown split {data['split']!r}.")
    try:
        data["qa"] = [QA(*row) for row in data["qa"]]
        return NanoRecord(key=sample.key, **data)
    except TypeError as error:
        raise DataError(f"{sample.where}: its .json member is not a nano record ({error}).") from None


def _decode(data: bytes, name: str, size: int) -> np.ndarray:
    try:
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise DataError(f"{name}: its picture cannot be decoded ({error}).") from None
    if pixels.shape != (size, size, 3):
        raise DataError(f"{name}: its picture is {pixels.shape[1]}x{pixels.shape[0]}, not {size}x{size}.")
    return pixels


def _lines(path: Path) -> list[tuple[Any, str]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; {BUILD_HINT}")
    rows = []
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: torn or damaged ({error}).") from None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            rows.append((json.loads(line), f"{path.name} line {number}"))
        except ValueError as error:
            raise DataError(f"{path.name} line {number}: not JSON ({error}).") from None
    return rows


def _edit(row: Any, name: str) -> Edit:
    if not isinstance(row, list) or len(row) != 6:
        raise DataError(f"{name}: an edit is [source, target, instruction, response, kind, split].")
    return Edit(*row)


def _conversation(row: Any, name: str) -> NanoConversation:
    try:
        messages = [{"role": role, "content": content} for role, *content in row["messages"]]
        return NanoConversation(row["split"], messages)
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{name}: a conversation is {{split, messages: [[role, part, ...], ...]}}.") from None
