"""The index of a data file: offsets of its records, in one `.npz`.

next to the file:   FOLDER/.seed-index/NAME.npz, written by `seed data index`, or at the first use
elsewhere:         SEED_INDEX_DIR, or ~/.cache/seed-multimodal/index for remote files
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from seed_multimodal.data.formats.storage import filesystem, is_remote, read_all, read_errors, stat
from seed_multimodal.disk import atomic_open, disk_reason
from seed_multimodal.entry import log_line
from seed_multimodal.errors import DataError

INDEX_FOLDER = ".seed-index"
MIN_STORED_BYTES = 1 << 20  # no index is written for smaller files
VERSION = "3"
DIGEST_BYTES = 16  # of the content, at the end of the file: zip's checksums leave its names out

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
        head = self._head()
        path = index_path(self.path)
        if _read(path, head) is not None:
            return
        try:
            _write(path, {"head": head, **self.scan()})
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({disk_reason(error)}).") from None

    def _head(self) -> np.ndarray:
        """What an index must have in common with the file: kind, version of this module, size, and
        version of the file."""
        size, version = stat(self.path)
        return np.array([self.kind, VERSION, str(size), version])

    @cached_property
    def arrays(self) -> Arrays:
        """The stored index, else a new one, which is stored."""
        head = self._head()
        remote = is_remote(self.path)

        # 1. Next to the file. An upload changes versions: of remote files only sizes are compared.
        path = index_path(self.path)
        arrays = _read(path, head[:3] if remote else head)
        if arrays is not None:
            return arrays

        # 2. In the folder of indexes.
        folder: str | Path | None = os.environ.get("SEED_INDEX_DIR")
        if not folder and remote:
            folder = Path.home() / ".cache/seed-multimodal/index"
        if folder:
            path = self._path_in(folder, head)
            arrays = _read(path, head)
            if arrays is not None:
                return arrays

        # 3. A new one.
        arrays = {"head": head, **self.scan()}
        if folder or int(head[2]) >= MIN_STORED_BYTES:
            try:
                _write(path, arrays)
            except OSError as error:
                log_line(
                    f"{self.path}: its index cannot be stored ({disk_reason(error)}), so every "
                    "process rebuilds it; set SEED_INDEX_DIR to a writable folder."
                )
        return arrays

    def _path_in(self, folder: str | Path, head: np.ndarray) -> str:
        """Path of the index in a folder of indexes of all files."""
        # One index for all links to a file, another one for each of its versions.
        name = self.path if is_remote(self.path) else os.path.realpath(self.path)
        identity = f"{name} {head}".encode("utf-8", "surrogateescape")
        digest = hashlib.sha256(identity).hexdigest()[:16]
        readable = self.path.rpartition("/")[2][:50]
        return str(Path(folder) / f"{readable}.{digest}.npz")


def index_path(path: str) -> str:
    """Path of the index next to a file."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{INDEX_FOLDER}/{name}.npz"


def _write(path: str, arrays: Arrays) -> None:
    """Write an index atomically. Raises OSError, or DataError for a remote folder."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    content = buffer.getvalue() + _digest(buffer.getvalue())
    if is_remote(path):
        files, name = filesystem(path)
        with read_errors(path):
            files.pipe_file(name, content)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path) as file:
        file.write(content)


def _read(path: str, head: np.ndarray) -> Arrays | None:
    """The stored index if it is undamaged and its header starts with `head`, else None."""
    try:
        content = read_all(path)
    except (DataError, OSError):
        return None
    zipped = content[:-DIGEST_BYTES]
    if content[-DIGEST_BYTES:] != _digest(zipped):
        return None
    with np.load(io.BytesIO(zipped), allow_pickle=False) as stored:
        if stored["head"][: len(head)].tolist() != head.tolist():
            return None
        return {name: stored[name] for name in stored.files}


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
