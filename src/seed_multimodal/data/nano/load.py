"""Read a built nano set: records, pictures, edit pairs, conversations.

    nano = load_nano()                 # the set in the repository, no download
    pictures = nano.images()           # uint8 [N, 64, 64, 3], same order as nano.records
    train = nano.split("train")        # indices
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from seed_multimodal.data.nano.families import SPLITS
from seed_multimodal.data.nano.types import QA, Edit, NanoConversation, NanoRecord
from seed_multimodal.data.formats.writer import Record, read_shards
from seed_multimodal.errors import DataError

KEYS = ("style", "family", "label", "split", "captions", "qa", "group", "subgroup", "tags", "colour")
BUILD_HINT = "build it with: python -m seed_multimodal.data.nano build --out data/nano64"


class NanoSet:
    """A loaded nano set. Pictures are decoded once, on the first `images()`."""

    def __init__(self, folder: Path, records: list[NanoRecord], pictures: list[bytes], names: list[str],
                 edits: list[Edit], conversations: list[NanoConversation], manifest: dict[str, Any]) -> None:
        self.folder, self.records, self.edits, self.conversations = folder, records, edits, conversations
        self.manifest = manifest
        self.size: int = manifest["size"]
        self._pictures, self._names = pictures, names

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def index(self) -> dict[str, int]:
        """key -> position in `records` and `images()`."""
        return {record.key: i for i, record in enumerate(self.records)}

    @cached_property
    def _pixels(self) -> np.ndarray:
        out = np.empty((len(self.records), self.size, self.size, 3), np.uint8)
        for i, (data, name) in enumerate(zip(self._pictures, self._names, strict=True)):
            out[i] = _decode(data, name, self.size)
        out.flags.writeable = False
        return out

    def images(self) -> np.ndarray:
        """All pictures, uint8 [N, size, size, 3] RGB on white, in the order of `records` (read-only, cached)."""
        return self._pixels

    def image(self, key: str) -> Image.Image:
        """One picture by key. Raises DataError for an unknown key."""
        if key not in self.index:
            raise DataError(f"{self.folder}: no picture {key!r}.")
        return Image.fromarray(_decode(self._pictures[self.index[key]], self._names[self.index[key]], self.size))

    def split(self, name: str) -> list[int]:
        """Indices of one split: train, val, test_concept or test_combo."""
        if name not in SPLITS:
            raise DataError(f"unknown split {name!r}; the splits are {', '.join(SPLITS)}.")
        return [i for i, record in enumerate(self.records) if record.split == name]


def find_nano(path: str | Path | None = None) -> Path:
    """Folder of the set: `path`, else $SEED_NANO_DATA, else data/nano64 of the project or the current folder."""
    given = path or os.environ.get("SEED_NANO_DATA")
    project = Path(__file__).resolve().parents[4]
    places = [Path(given)] if given else [project / "data" / "nano64", Path.cwd() / "data" / "nano64"]
    for place in places:
        if (place / "manifest.json").is_file():
            return place
    raise DataError(f"{places[0]}: no nano data set there (no manifest.json); {BUILD_HINT}")


def load_nano(
    path: str | Path | None = None, *, max_bad: int = 1, log: Callable[[str], None] | None = print
) -> NanoSet:
    """Load a nano set (see `find_nano` for where it looks).

    Args:
        path: its folder.
        max_bad: so many unreadable samples in a row are fatal; the default refuses the first.
        log: gets one sentence for each skipped sample.

    Raises:
        DataError: naming file and sample, when anything is missing, damaged or not as the manifest counts it.
    """
    folder = find_nano(path)
    manifest = _manifest(folder)
    shards = [folder / name for name in manifest["files"] if ".tar" in name]
    records, pictures, names = [], [], []
    for sample in read_shards(shards, required=("webp", "json"), max_bad=max_bad, log=log):
        records.append(_record(sample))
        pictures.append(sample.bytes("webp"))
        names.append(sample.name)
    if max_bad == 1 and len(records) != manifest["records"]:
        raise DataError(f"{folder}: the shards hold {len(records)} samples, the manifest says {manifest['records']}; "
                        f"{BUILD_HINT}")
    order = sorted(range(len(records)), key=lambda i: records[i].key)
    records = [records[i] for i in order]
    known = {record.key for record in records}
    if len(known) != len(records):
        raise DataError(f"{folder}: two samples have the same key.")
    edits = [_edit(row, name) for row, name in _lines(folder / "edits.jsonl.gz")]
    conversations = [_conversation(row, name) for row, name in _lines(folder / "conversations.jsonl.gz")]
    edits = [e for e in edits if max_bad == 1 or {e.source, e.target} <= known]
    conversations = [c for c in conversations if max_bad == 1 or set(c.keys) <= known]
    for key in {k for e in edits for k in (e.source, e.target)} | {k for c in conversations for k in c.keys}:
        if key not in known:
            raise DataError(f"{folder}: an edit or conversation names picture {key!r}, which no shard holds.")
    return NanoSet(folder, records, [pictures[i] for i in order], [names[i] for i in order], edits, conversations,
                   manifest)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}).") from None
    for key in ("size", "records", "files"):
        if not isinstance(manifest, dict) or key not in manifest:
            raise DataError(f"{path}: no key {key!r}; {BUILD_HINT}")
    return manifest


def _record(sample: Record) -> NanoRecord:
    data = sample.json(required=KEYS)
    if data["split"] not in SPLITS:
        raise DataError(f"{sample.name}: unknown split {data['split']!r}.")
    try:
        data["qa"] = [QA(*row) for row in data["qa"]]
        return NanoRecord(key=sample.key, **data)
    except TypeError as error:
        raise DataError(f"{sample.name}: its .json member is not a nano record ({error}).") from None


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
