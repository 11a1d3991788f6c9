"""Records of .jsonl and .json files by index: lines are read by offset, lists are in memory."""

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
from seed_multimodal.data.formats.storage import open_binary, read_all
from seed_multimodal.errors import first_line


class JsonLines(IndexedFile):
    """The lines of a .jsonl by index; blank lines are skipped."""

    kind = "jsonl"

    def scan(self) -> Arrays:
        """Offset, length and line number (from 1) of each record, int64 [N]."""
        # Arrays of C integers: a file may have millions of lines.
        starts = array("q")
        lengths = array("q")
        line_numbers = array("q")
        position = 0
        with open_binary(self.path) as file:
            for line_number, line in enumerate(file, 1):
                if line.strip():
                    starts.append(position)
                    lengths.append(len(line))
                    line_numbers.append(line_number)
                position += len(line)
        return {
            "start": np.array(starts),
            "length": np.array(lengths),
            "line": np.array(line_numbers),
        }

    @property
    def sizes(self) -> Sequence[int]:
        """One shard with all records."""
        return [len(self.arrays["start"])]

    def locate(self, row: int) -> Record:
        """An unread record."""
        start = self.arrays["start"].item(row)
        length = self.arrays["length"].item(row)
        key = f"line {self.arrays['line'].item(row)}"
        members: dict[str, bytes | ByteRange] = {"json": ByteRange(self.path, start, length)}
        return Record(key, f"{self.path}: {key}", {}, members, self.path)


class JsonList:
    """The items of a .json list, or an object per line, by index.

    They are one buffer, which forked workers share.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    @cached_property
    def _items(self) -> tuple[bytes, np.ndarray]:
        """The encoded items, and their offsets, int64 [N + 1]."""
        items = self._read_items()
        offsets = np.array([0, *accumulate(map(len, items))], np.int64)
        return b"".join(items), offsets

    def _read_items(self) -> list[bytes]:
        """Each item as JSON. Raises BadRecord."""
        content = read_all(self.path)
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            # A second object after the first one: an object per line.
            if getattr(error, "msg", "") == "Extra data" and content.lstrip().startswith(b"{"):
                return [line for line in content.splitlines() if line.strip()]
            raise BadRecord(
                "malformed json", f"{self.path}: is not JSON ({first_line(error)})."
            ) from None

        if isinstance(value, dict):
            # Records under a key, as COCO's captions; or a file of one line.
            one_line = b"\n" not in content.strip()
            value = value.get("annotations", [value] if one_line else None)
        if not isinstance(value, list):
            raise BadRecord(
                "malformed json",
                f"{self.path}: must have a list of records, or one object per line.",
            )
        return [json.dumps(item).encode() for item in value]

    @property
    def sizes(self) -> Sequence[int]:
        """One shard with all records."""
        _, offsets = self._items
        return [len(offsets) - 1]

    def locate(self, row: int) -> Record:
        """A record."""
        data, offsets = self._items
        key = f"item {row}"
        members: dict[str, bytes | ByteRange] = {"json": data[offsets[row] : offsets[row + 1]]}
        return Record(key, f"{self.path}: {key}", {}, members, self.path)
