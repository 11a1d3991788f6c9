"""Webdataset shards: members grouped into samples, and random access by an index of the headers, read once.

Why an index: the order of samples must be a function of (seed, step), which a stream cannot give. About 29 bytes per
sample are kept, in arrays (`index_store` keeps them on disk between runs). Plain .tar only, since a position inside a
.tar.gz cannot be read without unpacking all before it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from seed_multimodal.data.formats.index_file import Arrays, IndexedFile, Scan
from seed_multimodal.data.formats.packed import PackedStrings
from seed_multimodal.data.formats.parquet import KEPT, RowGroups
from seed_multimodal.data.formats.record import Place, Record
from seed_multimodal.data.formats.tar_headers import COMPRESSED, Damaged, split_name, tar_members, unpacked
from seed_multimodal.errors import DataError

Columns = Mapping[str, Sequence[str]]  # a part of a sample -> the extensions of its member, the preferred first
# Of one member in bytes. Offset ABSENT: the sample has none; of extension number `size` it has two (TWICE), or one of
# more than 4 GiB (HUGE), which is no picture or text.
SPAN = np.dtype([("offset", "<i8"), ("size", "<u4")])
ABSENT, TWICE, HUGE = -1, -2, -3
_NONE = 1 << 30


def tar_records(path: Path, wanted: Collection[str] | None = None, *, unpack: bool = False) -> Iterator[Record]:
    """The samples of a tar, unread, in the order on disk: neighbouring members with the same key are one sample.

    Args:
        wanted: extensions that become `members`; None: all. A sample with two members of one extension has a `problem`.
        unpack: read a .tar.gz as well; its members are read at once.

    Raises:
        DataError: the file cannot be opened, or is compressed.
        Damaged: where the tar breaks off; the incomplete sample there is left out.
    """
    content = unpacked(path) if unpack and path.suffix in COMPRESSED else None
    for key, members in _samples(path if content is None else content):
        record = Record(key, f"{path}: sample {key}", file=str(path))
        for extension, offset, size in members:
            if wanted is None or extension in wanted:
                if extension in record.members:
                    record.problem = _problem(record.where, extension, TWICE)
                elif content is not None:
                    record.members[extension] = content[offset:offset + size]
                else:
                    record.members[extension] = Place(str(path), offset, size)
                    record.problem = record.problem or _problem(record.where, extension, HUGE if size >> 32 else 0)
        yield record


def _samples(tar: Path | bytes) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
    """(key, its members as (extension, offset, size)) of each whole sample; raises as `tar_members`."""
    current: str = ""
    members: list[tuple[str, int, int]] = []
    for name, offset, size in tar_members(tar):
        key, extension = split_name(name)
        if not key:
            continue
        if key != current:
            if current:
                yield current, members
            current, members = key, []
        members.append((extension, offset, size))
    if current:
        yield current, members


class TarFile(IndexedFile):
    """The samples of a plain tar by number.

    Of a torn tar the whole samples before its damage are records, and the sample it tears in is a last one that has
    a `problem`: one bad sample, as a picture cut off is.

    Args:
        columns: the parts of a sample; a record's members have these names.
    """

    def __init__(self, path: Path, columns: Columns) -> None:
        super().__init__(path)
        self.columns = {name: tuple(extensions) for name, extensions in columns.items()}
        self.kind = f"tar {self.columns}"

    def scans(self) -> Sequence[Scan]:
        """One: the headers form a chain."""
        return [partial(_tar_arrays, self.path, self.columns)]

    @cached_property
    def keys(self) -> PackedStrings:
        """The keys of the whole samples."""
        return PackedStrings(self.arrays["keys"], self.arrays["ends"])

    @property
    def damage(self) -> str:
        """A sentence about where the tar is torn; empty: it is whole."""
        reason = self.arrays["damage"].tobytes().decode("utf-8", "surrogateescape")
        return f"{self.path}: {reason}" if reason else ""

    @property
    def sizes(self) -> Sequence[int]:
        """All samples are one piece; a torn one is among them."""
        return [len(self.keys) + bool(self.damage)]

    def count(self, column: str) -> int:
        """How many samples have this part."""
        return int(self.arrays["counts"][list(self.columns).index(column)])

    def has(self, column: str) -> np.ndarray:
        """Which samples have this part, bool [N]; reads the whole index, unlike `count`."""
        if not self.count(column):
            return np.zeros(len(self.keys), bool)
        return np.asarray(self.arrays[f"spans of {column}"]["offset"] != ABSENT)

    def locate(self, row: int) -> Record:
        """A sample, unread; its key is that in the shard."""
        file = self._name
        if row == len(self.keys):
            return Record("torn", file, file=file, problem=("damaged file", self.damage))
        key = self.keys[row]
        found = Record(key, f"{file}: sample {key}", file=file)
        for (name, extensions), spans in zip(self.columns.items(), self._spans, strict=True):
            offset, size = (ABSENT, 0) if spans is None else spans[row].item()
            if offset >= 0:
                found.members[name] = Place(file, offset, size)
            elif offset != ABSENT:
                found.problem = _problem(found.where, extensions[size], offset)
        return found

    @cached_property
    def _spans(self) -> list[np.ndarray | None]:
        """Of each column, SPAN [N]; None: no sample has it."""
        return [self.arrays.get(f"spans of {name}") for name in self.columns]


def _tar_arrays(path: Path, columns: Columns) -> Arrays:
    """The index of a tar; columns that no sample has are left out."""
    spans, keys, damage = scan_tar(path, columns)
    counts = (spans["offset"] != ABSENT).sum(0)
    reason = damage.removeprefix(f"{path}: ").encode("utf-8", "surrogateescape")  # the file may move
    return {"keys": keys.data, "ends": keys.ends, "counts": counts, "damage": np.frombuffer(reason, np.uint8),
            **{f"spans of {name}": np.ascontiguousarray(spans[:, number])
               for number, name in enumerate(columns) if counts[number]}}


def _problem(where: str, extension: str, offset: int) -> tuple[str, str] | None:
    """Of a sample with a member at `offset`: TWICE or HUGE."""
    if offset == TWICE:
        return "duplicate id", f"{where} has two .{extension} members."
    return ("damaged file", f"{where}: its .{extension} has more than 4 GiB.") if offset == HUGE else None


def scan_tar(path: Path, columns: Columns) -> tuple[np.ndarray, PackedStrings, str]:
    """Index one tar: (spans, keys) of the whole samples, and a sentence about its damage (empty: none).

    Raises:
        DataError: it cannot be opened, or is compressed.
    """
    places: dict[str, list[tuple[int, int]]] = {}  # extension -> columns that want it, and its number in them
    for column, extensions in enumerate(columns.values()):
        for number, extension in enumerate(extensions):
            places.setdefault(extension, []).append((column, number))
    keys: list[str] = []
    spans: list[tuple[int, int]] = []
    damage = ""
    try:
        for key, members in _samples(path):
            row = [(ABSENT, 0)] * len(columns)
            taken = [_NONE] * len(columns)  # of each column the number of the extension in `row`
            seen: list[str] = []
            for extension, offset, size in members:
                for column, number in places.get(extension, ()):
                    if extension in seen:
                        row[column] = (TWICE, min(number, row[column][1]) if row[column][0] == TWICE else number)
                    elif number < taken[column] and row[column][0] != TWICE:
                        row[column], taken[column] = (HUGE, number) if size >> 32 else (offset, size), number
                seen.append(extension)
            keys.append(key)
            spans += row
    except Damaged as error:
        after = f"after sample {keys[-1]}" if keys else "in its first sample"
        damage = f"{path}: torn or damaged {after} ({error})."
    return np.array(spans, SPAN).reshape(-1, len(columns)), PackedStrings.of(keys), damage


class OpenFiles:
    """Reads pieces of files, and rows of parquet files; each process (a forked worker) opens its own.

    Args:
        limit: files that stay open. rows: bytes of rows that are kept.
    """

    def __init__(self, limit: int = 64, rows: int = KEPT) -> None:
        self.limit = limit
        self._owner = os.getpid()
        self._open: OrderedDict[str, int] = OrderedDict()
        self.tables = RowGroups(rows)

    def read(self, path: str | Path, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset`. Raises DataError when they are no longer there."""
        path = str(path)
        self._leave_parents()
        try:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
            self._open.move_to_end(path)
            while len(self._open) > self.limit:
                os.close(self._open.popitem(last=False)[1])
            data = b""
            while len(data) < size:
                piece = os.pread(self._open[path], size - len(data), offset + len(data))
                if not piece:
                    raise DataError(f"{path}: it is shorter than when it was indexed; do not change shards in use.")
                data += piece
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
        return data

    def row(self, path: str | Path, number: int) -> dict[str, Any]:
        """The fields of a row of a parquet file. Raises BadRecord when it cannot be read."""
        self._leave_parents()
        return self.tables.row(str(path), number)

    def close(self) -> None:
        """Close what this process holds open, and drop rows kept in memory."""
        while self._open:
            os.close(self._open.popitem()[1])
        self.tables.clear()

    def _leave_parents(self) -> None:
        """A forked process shares positions in the files that it inherits, so it closes them."""
        if self._owner != os.getpid():
            self.close()
            self._owner = os.getpid()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[int, int]]:
        return OpenFiles, (self.limit, self.tables.kept)  # open files stay behind when a worker is spawned
