"""The index of a data file: offsets of its records, in one local `.npz`.

It is in SEED_INDEX_DIR, else of local files in FOLDER/.seed-index/NAME.npz, of remote ones in
~/.cache/seed-multimodal/index. It is written by `seed data index`, or when the file is first used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from seed_multimodal.data.formats.storage import FileReader, is_remote, read_safely, stat
from seed_multimodal.disk import atomic_open, disk_reason
from seed_multimodal.entry import log_line
from seed_multimodal.errors import DataError, ReadError

INDEX_FOLDER = ".seed-index"
MIN_STORED_BYTES = 1 << 20  # no index is written for smaller files
VERSION = "6"
MANIFEST = ".manifest"  # stands for a file of this name, which has an index
MANIFEST_HEAD = np.array([MANIFEST, VERSION])
CACHED_BYTES = 64 << 20  # of stored indexes in a process

Arrays = Mapping[str, np.ndarray]


class FileEntry(NamedTuple):
    """What a manifest has of a file: size and version as of `storage.stat`, number of records."""

    size: int
    version: str
    records: int


class CountedFile(FileReader):
    """A file whose records are counted once, by a manifest or when it is first used."""

    entry: FileEntry | None = None

    def count(self) -> int:
        """Number of records, from the file. Raises DataError, or an error of reading."""
        raise NotImplementedError

    @property
    def sizes(self) -> Sequence[int]:
        """One shard with all records."""
        return [self.count() if self.entry is None else self.entry.records]

    def check_entry(self, entry: FileEntry) -> None:
        """Raise ReadError if the file is not the one that was counted; it will be counted anew."""
        if self.entry is not None and is_remote(self.path):  # listings may have other versions
            entry = entry._replace(version=self.entry.version)
        if self.entry not in (None, entry):
            manifest = manifest_path(os.path.dirname(self.path))
            with contextlib.suppress(OSError):  # else the next run would count as this one
                manifest.unlink()
            raise ReadError(
                f"{self.path}: changed since its records were counted; start again without "
                f"{manifest}."
            )
        self.entry = entry


class IndexedFile(CountedFile):
    """A file with indexed records; base of the readers."""

    kind = ""
    _arrays: Arrays | None = None

    @staticmethod
    def count_indexed(arrays: Arrays) -> int:
        """Number of records of an index."""
        raise NotImplementedError

    def scan(self) -> Arrays:
        """Build the index from the file's content. Raises DataError, or an error of reading."""
        raise NotImplementedError

    def write_index(self) -> int:
        """Write the index, unless it exists; returns the number of records. Raises DataError."""
        return self.count_indexed(self._read_index(must_store=True))

    def count(self) -> int:
        """Number of records, from the index, of which nothing is kept if it is stored."""
        return self.count_indexed(self._read_index())

    @property
    def arrays(self) -> Arrays:
        """The stored index, else a new one, which is stored."""
        arrays = self._arrays
        if arrays is None:
            arrays = self._read_index()
            if self._arrays is None:  # it is stored
                self._arrays = arrays
                _recent[self] = sum(array.nbytes for array in arrays.values())
                _drop_oldest()
        return arrays

    def _read_index(self, must_store: bool = False) -> Arrays:
        # 1. The stored index must have the file's size and version, and those of this module.
        size, version = stat(self.path, was_there=self.entry is not None)
        head = np.array([self.kind, VERSION, str(size), version])
        path = index_path(self.path, head)
        arrays = read_arrays(path, head)

        # 2. A new one.
        if arrays is None:
            arrays = {"head": head, **read_safely(self.path, self.scan)}
            has_folder = bool(os.environ.get("SEED_INDEX_DIR")) or is_remote(self.path)
            may_store = must_store or has_folder or size >= MIN_STORED_BYTES
            effect = f"every process rebuilds the index of {self.path}"
            if not (may_store and write_arrays(path, arrays, effect, must_store)):
                self._arrays = arrays  # it cannot be read again
        self.check_entry(FileEntry(size, version, self.count_indexed(arrays)))
        return arrays


_recent: dict[IndexedFile, int] = {}  # reader → bytes of its stored index; the last read one last


def _drop_oldest() -> None:
    """Drop the stored indexes that were read longest ago, but not the last one."""
    while sum(_recent.values()) > CACHED_BYTES and len(_recent) > 1:
        oldest = next(iter(_recent))
        del _recent[oldest]
        oldest._arrays = None


def manifest_path(folder: str) -> Path:
    """Where the manifest of a folder is stored: as the index of a file in it."""
    return index_path(os.path.join(folder, MANIFEST), MANIFEST_HEAD)


def index_path(path: str, head: np.ndarray) -> Path:
    """Where the index of a file is stored."""
    folder = os.environ.get("SEED_INDEX_DIR")
    if not folder and not is_remote(path):
        return Path(path).parent / INDEX_FOLDER / f"{Path(path).name}.npz"

    # A folder of the indexes of all files: one for all links to a file, and one for each version.
    name = path if is_remote(path) else os.path.realpath(path)
    identity = f"{name} {head}".encode("utf-8", "surrogateescape")
    digest = hashlib.sha256(identity).hexdigest()[:16]
    readable = path.rpartition("/")[2][:50]
    default = Path.home() / ".cache/seed-multimodal/index"
    return Path(folder or default) / f"{readable}.{digest}.npz"


def read_arrays(path: Path, head: np.ndarray) -> Arrays | None:
    """A stored index or manifest if it is undamaged and has this header, else None."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return arrays if arrays["head"].tolist() == head.tolist() else None
    except (OSError, ValueError, LookupError, EOFError, BadZipFile, zlib.error):
        return None


def write_arrays(path: Path, arrays: Arrays, effect: str, must_store: bool = False) -> bool:
    """Store an index or a manifest; whether it succeeded.

    effect: of not writing it, in the line that is logged then.

    Raises DataError: it must be stored, but cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_open(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        reason = f"{path}: cannot be written ({disk_reason(error)})"
        if must_store:
            raise DataError(f"{reason}.") from None
        log_line(f"{reason}, so {effect}; set SEED_INDEX_DIR to a writable folder.")
        return False
    return True
