"""Webdataset shards: members grouped into samples, and random access by an index of the headers, read once.

Why an index: the order of samples must be a function of (seed, step), which a stream cannot give. About 41 bytes per
sample are kept, in arrays; with an `index_folder` they are kept on disk between runs, and a shard that changed is
indexed again. Plain .tar only, since a position inside a .tar.gz cannot be read without unpacking all before it.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from seed_multimodal.data.formats.packed import PackedStrings
from seed_multimodal.data.formats.record import Place, Record
from seed_multimodal.data.formats.tar_headers import Damaged, split_name, tar_members, unpacked
from seed_multimodal.disk import replacing
from seed_multimodal.errors import DataError

Columns = Mapping[str, Sequence[str]]  # a part of a sample -> the extensions of its member, the preferred first
SPAN = np.dtype([("offset", "<i8"), ("size", "<u4")])  # of one member in bytes; offset -1: the sample has none


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
                current.problem = f"{path}: sample {key} has two .{extension} members."
            current.members[extension] = (Place(str(path), offset, size) if content is None else
                                          content[offset:offset + size])
    if current is not None:
        yield current


class TarFile:
    """The samples of a plain tar by number.

    Args:
        columns: the parts of a sample; a record's members have these names.
        index_folder: where indexes of earlier runs are found and new ones written (each whole or not at all).
        keep_torn: use the whole samples before the damage of a torn shard, and `log` its sentence.
    """

    def __init__(self, path: Path, columns: Columns, *, index_folder: str | Path | None = None,
                 keep_torn: bool = False, log: Callable[[str], None] | None = print) -> None:
        self.path, self._name = path, str(path)
        self.columns = {name: tuple(extensions) for name, extensions in columns.items()}
        self._index_folder, self._keep_torn, self._log = index_folder, keep_torn, log

    @cached_property
    def index(self) -> tuple[np.ndarray, PackedStrings]:
        """(spans of type SPAN [N, columns], keys).

        Raises:
            DataError: naming the tar that cannot be opened, is compressed, torn or no tar, or names a member twice.
        """
        kept = _kept_file(self.path, self.columns, Path(self._index_folder)) if self._index_folder else None
        found = _read_kept(kept) if kept else None
        if found is not None:
            return found
        spans, keys, damage = scan_tar(self.path, self.columns)
        if damage and not self._keep_torn:
            raise DataError(damage)
        if damage and self._log is not None:
            self._log(f"{damage} The {len(keys)} whole samples before that are used.")
        if kept and not damage:
            _write_kept(kept, spans, keys)
        return spans, keys

    @property
    def sizes(self) -> Sequence[int]:
        """All samples are one piece."""
        return [len(self.index[0])]

    def has(self, column: str) -> np.ndarray:
        """Which samples have this part, bool [N]."""
        return np.asarray(self.index[0]["offset"][:, list(self.columns).index(column)] >= 0)

    def locate(self, row: int) -> Record:
        """A sample, unread; its key is that in the shard."""
        spans, keys = self.index
        file, key = self._name, keys[row]
        members: dict[str, bytes | Place] = {
            name: Place(file, offset, size)
            for name, (offset, size) in zip(self.columns, spans[row].tolist(), strict=True) if offset >= 0}
        return Record(key, f"{file}: sample {key}", {}, members, file)


def scan_tar(path: Path, columns: Columns) -> tuple[np.ndarray, PackedStrings, str]:
    """Index one tar: (spans, keys) of the whole samples, and a sentence about its damage (empty: none).

    Raises:
        DataError: it cannot be opened, is compressed, or a sample has two members of one extension.
    """
    keys: list[str] = []
    spans: list[tuple[int, int]] = []
    damage = ""
    try:
        for record in tar_records(path, {extension for several in columns.values() for extension in several}):
            if record.problem:
                raise DataError(record.problem)
            keys.append(record.key)
            for extensions in columns.values():
                found = next((record.members[one] for one in extensions if one in record.members), None)
                spans.append((found.offset, found.size) if isinstance(found, Place) else (-1, 0))
    except Damaged as error:
        after = f"after sample {keys[-1]}" if keys else "in its first sample"
        damage = f"{path}: torn or damaged {after} ({error})."
    return np.array(spans, SPAN).reshape(-1, len(columns)), PackedStrings.of(keys), damage


def _kept_file(shard: Path, columns: Columns, folder: Path) -> Path:
    """The file of a shard's index; its name changes with the shard's place, size and time."""
    try:
        about = shard.stat()
    except OSError as error:
        raise DataError(f"{shard}: cannot be opened ({error.strerror}).") from None
    mark = repr((str(shard.resolve()), about.st_size, about.st_mtime_ns, columns))
    return folder / f"{shard.name}.{hashlib.sha256(mark.encode()).hexdigest()[:16]}.npz"


def _read_kept(file: Path) -> tuple[np.ndarray, PackedStrings] | None:
    try:
        with np.load(file, allow_pickle=False) as kept:
            return kept["spans"], PackedStrings(kept["data"], kept["ends"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # none yet, or damaged: the shard is read instead
        return None


def _write_kept(file: Path, spans: np.ndarray, keys: PackedStrings) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as handle:
            np.savez(handle, spans=spans, data=keys.data, ends=keys.ends)
    except OSError as error:
        raise DataError(f"{file.parent}: the index of a shard cannot be written there ({error.strerror}).") from None


class OpenFiles:
    """Reads pieces of files; at most `limit` files stay open, and each process (a forked worker) opens its own."""

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self._owner = os.getpid()
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str | Path, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset`. Raises DataError when they are no longer there."""
        path = str(path)
        if self._owner != os.getpid():
            self.close()
            self._owner = os.getpid()
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

    def close(self) -> None:
        """Close what this process holds open."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[int]]:
        return OpenFiles, (self.limit,)  # open files stay behind when a worker is spawned
