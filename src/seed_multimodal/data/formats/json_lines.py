"""Records of a .jsonl or .json file by number; positions of lines, found without keeping the file in memory."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from seed_multimodal.data.formats.index_file import Arrays, IndexedFile, Scan
from seed_multimodal.data.formats.json_lists import BOM, LISTS, index_array, opened
from seed_multimodal.data.formats.record import Place, Record

BLOCK = 1 << 24
CHUNK = 1 << 27  # bytes of a file of lines that are indexed at a time
_SPACE = np.zeros(256, bool)
_SPACE[list(b" \t\r\n\v\f")] = True


class JsonFile(IndexedFile):
    """The lines of a .jsonl (blank ones skipped), or the items of a .json list, by number.

    Args:
        lines: it is a .jsonl; else the content decides.
        key: the list stands under this key of an object (or is the whole file); else under one of `LISTS`.
    """

    def __init__(self, path: Path, lines: bool = False, key: str | None = None) -> None:
        super().__init__(path)
        self._lines, self._keys = lines and key is None, LISTS if key is None else (key,)
        self.kind = "jsonl" if self._lines else f"json {self._keys}"

    def scans(self) -> Sequence[Scan]:
        """One for each `CHUNK` of lines; a list can only be read from its start."""
        if not self._lines and (self._keys is not LISTS or not is_lines(self.path)):
            return [partial(_items, self.path, self._keys)]
        cuts = _line_starts(self.path)
        return [partial(_lines_between, self.path, start, end) for start, end in pairwise(cuts)]

    def join(self, found: Sequence[Arrays]) -> Arrays:
        """The index (`_compact`) of all pieces."""
        if "breaks" not in found[0]:
            return _compact(found[0]["starts"], found[0]["ends"], None)
        before = np.cumsum([0, *(int(one["breaks"][0]) for one in found)])
        numbers = [one["numbers"] + first for one, first in zip(found, before[:-1], strict=True)]
        return _compact(_joined([one["starts"] for one in found]), _joined([one["ends"] for one in found]),
                        _joined(numbers))

    @property
    def sizes(self) -> Sequence[int]:
        """All records are one piece."""
        return [len(self.arrays["starts"])]

    def locate(self, row: int) -> Record:
        """A record, unread; its key is the line or item."""
        found = self.arrays
        numbers = found.get("numbers")
        place = f"item {row}" if numbers is None else f"line {numbers[row] if len(numbers) else row + 1}"
        data = Place(self._name, int(found["starts"][row]), int(found["lengths"][row]))
        return Record(place.replace(" ", ""), f"{self._name}: {place}", {}, {"json": data}, self._name)


def _compact(starts: np.ndarray, ends: np.ndarray, numbers: np.ndarray | None) -> Arrays:
    """12 bytes a record: first byte (int64 [N]) and `lengths` (uint32 [N] where that holds them); the numbers of lines
    (none of a list) only where blank lines make them other than 1, 2, 3 …"""
    lengths = ends - starts
    small = not len(lengths) or int(lengths.max()) < 1 << 32
    found = {"starts": starts, "lengths": lengths.astype(np.uint32) if small else lengths}
    if numbers is not None:
        plain = not len(numbers) or int(numbers[-1]) == len(numbers)
        found["numbers"] = numbers[:0] if plain else numbers
    return found


def _items(path: Path, keys: Sequence[str]) -> Arrays:
    starts, ends = index_array(path, keys)
    return {"starts": starts, "ends": ends}


def _lines_between(path: Path, start: int, end: int) -> Arrays:
    starts, ends, numbers, breaks = _scan_lines(path, start, end)
    return {"starts": starts, "ends": ends, "numbers": numbers, "breaks": np.array([breaks])}


def _line_starts(path: Path) -> list[int]:
    """Places to cut a file of lines at: its start, the first line after each `CHUNK` bytes, its end."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        cuts = [0]
        while cuts[-1] + 2 * CHUNK < size:
            position = cuts[-1] + CHUNK
            file.seek(position)
            while block := file.read(1 << 16):
                place = block.find(b"\n")
                position += len(block) if place < 0 else place + 1
                if place >= 0:
                    break
            cuts.append(position)
        return [*cuts, size]


def is_lines(path: Path) -> bool:
    """Whether a file named .json holds an object per line."""
    with opened(path) as file:
        start = file.read(4096).lstrip(BOM + b" \t\r\n")
        if not start.startswith(b"{"):
            return False
        file.seek(0)
        line = b""
        while not line.strip(BOM + b" \t\r\n"):
            line = file.readline(1 << 26)
    try:
        first = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False  # pretty-printed over several lines, or broken
    return isinstance(first, dict) and not any(isinstance(first.get(key), list) for key in LISTS)


def index_lines(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first byte, end, line number from 1) of each line that is not blank, each int64 [N]."""
    return _scan_lines(path)[:3]


def _scan_lines(path: Path, begin: int = 0, end: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """As `index_lines`, of a piece that begins with a line and ends with one; and how many line ends it has."""
    starts, ends, numbers = [], [], []
    line, filled = 1, False
    with opened(path) as file:
        if begin or file.read(3) != BOM:
            file.seek(begin)
        position = line_start = file.tell()
        left = sys.maxsize if end is None else end - position
        while left > 0 and (block := file.read(min(BLOCK, left))):
            left -= len(block)
            data = np.frombuffer(block, np.uint8)
            breaks = np.flatnonzero(data == 10)
            cuts = np.concatenate([[0], breaks + 1])  # where the pieces between line ends begin
            whole = cuts[cuts < len(data)]
            counts = np.logical_or.reduceat(~_SPACE[data], whole)
            counts = counts if len(whole) == len(cuts) else np.append(counts, False)
            counts[0] |= filled
            first = np.concatenate([[line_start], position + breaks + 1])
            if len(breaks):
                good = counts[:-1]
                starts.append(first[:-1][good])
                ends.append((position + breaks)[good])
                numbers.append(np.arange(line, line + len(breaks))[good])
            filled, line_start, line = bool(counts[-1]), int(first[-1]), line + len(breaks)
            position += len(block)
    if filled:  # the last line has no line end
        starts.append(np.array([line_start]))
        ends.append(np.array([position]))
        numbers.append(np.array([line]))
    return _joined(starts), _joined(ends), _joined(numbers), line - 1


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
