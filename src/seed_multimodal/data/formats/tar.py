"""Webdataset shards: members grouped into samples, and random access by an index of the headers, read once.

Why an index: the order of samples must be a function of (seed, step), which a stream cannot give. About 41 bytes per
sample are kept, in arrays; with an `index_folder` they are kept on disk between runs, and a shard that changed is
indexed again. Plain .tar only, since a position inside a .tar.gz cannot be read without unpacking all before it.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from seed_multimodal.data.formats.packed import PackedStrings
from seed_multimodal.data.formats.parquet import RowGroups
from seed_multimodal.data.formats.record import Place, Record
from seed_multimodal.data.formats.tar_headers import Damaged, split_name, tar_members, unpacked
from seed_multimodal.disk import replacing
from seed_multimodal.errors import DataError

Columns = Mapping[str, Sequence[str]]  # a part of a sample -> the extensions of its member, the preferred first
# Of one member in bytes. Offset ABSENT: the sample has none; TWICE: it has two of one extension, of number `size`.
SPAN = np.dtype([("offset", "<i8"), ("size", "<u4")])
ABSENT, TWICE = -1, -2


def tar_records(path: Path, wanted: Collection[str] | None = None, *, unpack: bool = False) -> Iterator[Record]:
    """The samples of a tar, unread, in the order on disk: neighbouring members with the same key are one sample.

    Args:
        wanted: extensions that become `members`; None: all. A sample with two members of one extension has a `problem`.
        unpack: read a .tar.gz as well; its members are read at once.

    Raises:
        DataError: the file cannot be opened, or is compressed.
        Damaged: where the tar breaks off; the incomplete sample there is left out.
    """
    content = unpacked(path) if unpack and path.suffix in (".gz", ".tgz") else None
    current: Record | None = None
    for name, offset, size in tar_members(path if content is None else content):
        key, extension = split_name(name)
        if not key:
            continue
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = Record(key, f"{path}: sample {key}", file=str(path))
        if wanted is None or extension in wanted:
            if extension in current.members:
                current.problem = _twice(current.where, extension)
                current.members[extension] = Place(str(path), TWICE, 0)
                continue
            current.members[extension] = (Place(str(path), offset, size) if content is None else
                                          content[offset:offset + size])
    if current is not None:
        yield current


class TarFile:
    """The samples of a plain tar by number.

    Of a torn tar the whole samples before its damage are records, and the sample it tears in is a last one that has
    a `problem`: one bad sample, as a picture cut off is.

    Args:
        columns: the parts of a sample; a record's members have these names.
        index_folder: where indexes of earlier runs are found and new ones written (each whole or not at all).
    """

    def __init__(self, path: Path, columns: Columns, *, index_folder: str | Path | None = None) -> None:
        self.path, self._name = path, str(path)
        self.columns = {name: tuple(extensions) for name, extensions in columns.items()}
        self._index_folder = index_folder

    @cached_property
    def index(self) -> tuple[np.ndarray, PackedStrings, str]:
        """(spans of type SPAN [N, columns], keys, a sentence about the tar's damage; empty: none) of its whole samples.

        Raises:
            DataError: naming the tar that cannot be opened or is compressed.
        """
        kept = _kept_file(self.path, self.columns, Path(self._index_folder)) if self._index_folder else None
        found = _read_kept(kept) if kept else None
        if found is not None:
            return found
        found = scan_tar(self.path, self.columns)
        if kept:
            _write_kept(kept, *found)
        return found

    @property
    def damage(self) -> str:
        """A sentence about where the tar is torn; empty: it is whole."""
        return self.index[2]

    @property
    def sizes(self) -> Sequence[int]:
        """All samples are one piece; a torn one is among them."""
        return [len(self.index[0]) + bool(self.damage)]

    def has(self, column: str) -> np.ndarray:
        """Which samples have this part, bool [N]."""
        return np.asarray(self.index[0]["offset"][:, list(self.columns).index(column)] != ABSENT)

    def locate(self, row: int) -> Record:
        """A sample, unread; its key is that in the shard."""
        spans, keys, damage = self.index
        file = self._name
        if row == len(keys):
            return Record("torn", file, file=file, problem=("damaged file", damage))
        found = Record(keys[row], f"{file}: sample {keys[row]}", file=file)
        for (name, extensions), (offset, size) in zip(self.columns.items(), spans[row].tolist(), strict=True):
            if offset == TWICE:
                found.problem = _twice(found.where, extensions[size])
            elif offset != ABSENT:
                found.members[name] = Place(file, offset, size)
        return found


def _twice(where: str, extension: str) -> tuple[str, str]:
    return "duplicate id", f"{where} has two .{extension} members."


def scan_tar(path: Path, columns: Columns) -> tuple[np.ndarray, PackedStrings, str]:
    """Index one tar: (spans, keys) of the whole samples, and a sentence about its damage (empty: none).

    Raises:
        DataError: it cannot be opened, or is compressed.
    """
    keys: list[str] = []
    spans: list[tuple[int, int]] = []
    damage = ""
    try:
        for record in tar_records(path, {extension for several in columns.values() for extension in several}):
            keys.append(record.key)
            for extensions in columns.values():
                spans.append(_span([record.members.get(one) for one in extensions]))
    except Damaged as error:
        after = f"after sample {keys[-1]}" if keys else "in its first sample"
        damage = f"{path}: torn or damaged {after} ({error})."
    return np.array(spans, SPAN).reshape(-1, len(columns)), PackedStrings.of(keys), damage


def _span(members: Sequence[bytes | Place | None]) -> tuple[int, int]:
    """The span of the first member that is there."""
    there = [(number, found) for number, found in enumerate(members) if isinstance(found, Place)]
    twice = next((number for number, found in there if found.offset == TWICE), None)
    if twice is not None:
        return TWICE, twice
    return (there[0][1].offset, there[0][1].size) if there else (ABSENT, 0)


def _kept_file(shard: Path, columns: Columns, folder: Path) -> Path:
    """The file of a shard's index; its name changes with the shard's place, size and time."""
    try:
        about = shard.stat()
    except OSError as error:
        raise DataError(f"{shard}: cannot be opened ({error.strerror}).") from None
    mark = repr((str(shard.resolve()), about.st_size, about.st_mtime_ns, columns))
    return folder / f"{shard.name}.{hashlib.sha256(mark.encode()).hexdigest()[:16]}.npz"


def _read_kept(file: Path) -> tuple[np.ndarray, PackedStrings, str] | None:
    try:
        with np.load(file, allow_pickle=False) as kept:
            return kept["spans"], PackedStrings(kept["data"], kept["ends"]), str(kept["damage"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # none yet, or damaged: the shard is read instead
        return None


def _write_kept(file: Path, spans: np.ndarray, keys: PackedStrings, damage: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as handle:
            np.savez(handle, spans=spans, data=keys.data, ends=keys.ends, damage=np.array(damage))
    except OSError as error:
        raise DataError(f"{file.parent}: the index of a shard cannot be written there ({error.strerror}).") from None


class OpenFiles:
    """Reads pieces of files, and rows of parquet files; at most `limit` files stay open, and each process (a forked
    worker) opens its own."""

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self._owner = os.getpid()
        self._open: OrderedDict[str, int] = OrderedDict()
        self.tables = RowGroups()

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

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[int]]:
        return OpenFiles, (self.limit,)  # open files stay behind when a worker is spawned
