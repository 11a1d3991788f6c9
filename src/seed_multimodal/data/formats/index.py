"""The index of a data file: offsets of its records, in one `.npz`.

next to the file:   FOLDER/.seed-index/NAME.npz, written by `seed data index`, or at the first use
elsewhere:         SEED_INDEX_DIR, or ~/.cache/seed-multimodal/index for remote files
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from seed_multimodal.data.formats.storage import filesystem, is_remote, read_all, read_errors, stat
from seed_multimodal.disk import atomic_open, disk_reason
from seed_multimodal.entry import log_line
from seed_multimodal.errors import DataError

INDEX_FOLDER = ".seed-index"
MIN_STORED_BYTES = 1 << 20  # bytes: no index is written for smaller files
VERSION = "2"

Arrays = Mapping[str, np.ndarray]


class IndexedFile:
    """A file with indexed records; base of the readers."""

    kind = ""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    def scan(self) -> Arrays:
        """Build the index from the file's content. Raises DataError."""
        raise NotImplementedError

    def write_index(self) -> None:
        """Write the index next to the file, unless it exists. Raises DataError."""
        head, place = self._head(), index_path(self.path)
        if _read(place, head) is None:
            try:
                _write(place, {"head": head, **self.scan()})
            except OSError as error:
                raise DataError(f"{place}: cannot be written ({disk_reason(error)}).") from None

    def _head(self) -> np.ndarray:
        size, version = stat(self.path)
        return np.array([self.kind, VERSION, str(size), version])

    @cached_property
    def arrays(self) -> Arrays:
        """The index next to the file or in the index folder, else a new one, which is stored there."""
        remote, head, adjacent = is_remote(self.path), self._head(), index_path(self.path)
        folder = os.environ.get("SEED_INDEX_DIR") or (
            Path.home() / ".cache/seed-multimodal/index" if remote else ""
        )
        name = self.path if remote else os.path.realpath(self.path)
        digest = hashlib.sha256(f"{name} {head}".encode("utf-8", "surrogateescape")).hexdigest()[
            :16
        ]
        own = (
            str(Path(folder) / f"{self.path.rpartition('/')[2][:50]}.{digest}.npz")
            if folder
            else adjacent
        )
        arrays = _read(adjacent, head[:3] if remote else head) or _read(own, head)
        if arrays is None:
            arrays = {"head": head, **self.scan()}
            if folder or int(head[2]) >= MIN_STORED_BYTES:
                try:
                    _write(own, arrays)
                except OSError as error:
                    log_line(
                        f"{self.path}: its index cannot be stored ({disk_reason(error)}), so every process "
                        "rebuilds it; set SEED_INDEX_DIR to a writable folder."
                    )
        return arrays


def index_path(path: str) -> str:
    """Path of the index next to a file."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{INDEX_FOLDER}/{name}.npz"


def _write(place: str, arrays: Arrays) -> None:
    """Write an index atomically. Raises OSError, or DataError for a remote folder."""
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    if is_remote(place):
        files, name = filesystem(place)
        with read_errors(place):
            files.pipe_file(name, content.getvalue())
        return
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(place) as file:
        file.write(content.getvalue())


def _read(place: str, head: np.ndarray) -> Arrays | None:
    """The stored index if its header equals `head`, else None."""
    try:
        with np.load(io.BytesIO(read_all(place)), allow_pickle=False) as found:
            same = found["head"][: len(head)].tolist() == head.tolist()
            return {name: found[name] for name in found.files} if same else None
    except (DataError, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
