"""Records of .jsonl and .json files by index: lines are read by offset, lists are held in memory."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from seed_multimodal.data.formats.index import Arrays, IndexedFile
from seed_multimodal.data.formats.record import BadRecord, ByteRange, Record
from seed_multimodal.data.formats.storage import open_binary, read_all, read_errors
from seed_multimodal.errors import first_line


class JsonLines(IndexedFile):
    """The lines of a .jsonl by index; blank lines are skipped."""

    kind = "jsonl"

    def scan(self) -> Arrays:
        """Offset, length and line number (from 1) of each record, int64 [N]."""
        start, length, line = array("q"), array("q"), array("q")
        position = 0
        with read_errors(self.path), open_binary(self.path) as file:
            for number, content in enumerate(file, 1):
                if content.strip():
                    start.append(position)
                    length.append(len(content))
                    line.append(number)
                position += len(content)
        return {"start": np.array(start), "length": np.array(length), "line": np.array(line)}

    @property
    def sizes(self) -> Sequence[int]:
        """One shard with all records."""
        return [len(self.arrays["start"])]

    def locate(self, row: int) -> Record:
        """An unread record."""
        line, start, length = (self.arrays[name].item(row) for name in ("line", "start", "length"))
        members: dict[str, bytes | ByteRange] = {"json": ByteRange(self.path, start, length)}
        return Record(f"line {line}", f"{self.path}: line {line}", {}, members, self.path)


class JsonList:
    """The items of a .json list, or an object per line, by index; one buffer that forked workers share."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    @cached_property
    def _items(self) -> tuple[bytes, np.ndarray]:
        """The encoded items and their offsets."""
        content = read_all(self.path)
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            if getattr(error, "msg", "") != "Extra data" or not content.lstrip().startswith(b"{"):
                raise BadRecord(
                    "malformed json", f"{self.path}: is not JSON ({first_line(error)})."
                ) from None
            written = [line for line in content.splitlines() if line.strip()]
        else:
            if isinstance(value, dict):  # as COCO's captions; or a file of one line
                value = value.get("annotations", None if b"\n" in content.strip() else [value])
            if not isinstance(value, list):
                raise BadRecord(
                    "malformed json",
                    f"{self.path}: must have a list of records, or one object per line.",
                )
            written = [json.dumps(item).encode() for item in value]
        return b"".join(written), np.array([0, *accumulate(map(len, written))], np.int64)

    @property
    def sizes(self) -> Sequence[int]:
        """One shard with all records."""
        return [len(self._items[1]) - 1]

    def locate(self, row: int) -> Record:
        """A record."""
        data, ends = self._items
        members: dict[str, bytes | ByteRange] = {"json": data[ends[row] : ends[row + 1]]}
        return Record(f"item {row}", f"{self.path}: item {row}", {}, members, self.path)
