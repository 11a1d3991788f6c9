"""The index of a data file: offsets of its records, in one local `.npz`.

It is in SEED_INDEX_DIR, else of local files in FOLDER/.seed-index/NAME.npz, of remote ones in
~/.cache/seed-multimodal/index. It is written by `seed data index`, or when the file is first used.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from seed_multimodal.data.formats.storage import FileReader, is_remote, read_safely, stat
from seed_multimodal.disk import atomic_open, disk_reason
from seed_multimodal.entry import log_line
from seed_multimodal.errors import DataError

INDEX_FOLDER = ".seed-index"
MIN_STORED_BYTES = 1 << 20  # no index is written for smaller files
VERSION = "6"

Arrays = Mapping[str, np.ndarray]


class IndexedFile(FileReader):
    """A file with indexed records; base of the readers."""

    kind = ""

    def scan(self) -> Arrays:
        """Build the index from the file's content. Raises DataError, or an error of reading."""
        raise NotImplementedError

    def write_index(self) -> None:
        """Write the index, unless it exists. Raises DataError."""
        self._read_index(must_store=True)

    @cached_property
    def arrays(self) -> Arrays:
        """The stored index, else a new one, which is stored."""
        return self._read_index()

    def _read_index(self, must_store: bool = False) -> Arrays:
        # 1. The stored index must have the file's size and version, and those of this module.
        size, version = stat(self.path)
        head = np.array([self.kind, VERSION, str(size), version])
        path = _index_path(self.path, head)
        stored = _read(path, head)
        if stored is not None:
            return stored

        # 2. A new one.
        arrays = {"head": head, **read_safely(self.path, self.scan)}
        has_folder = bool(os.environ.get("SEED_INDEX_DIR")) or is_remote(self.path)
        if not (must_store or has_folder or size >= MIN_STORED_BYTES):
            return arrays
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_open(path) as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        except OSError as error:
            reason = f"{path}: cannot be written ({disk_reason(error)})"
            if must_store:
                raise DataError(f"{reason}.") from None
            log_line(
                f"{reason}, so every process rebuilds the index of {self.path}; set "
                "SEED_INDEX_DIR to a writable folder."
            )
        return arrays


def _index_path(path: str, head: np.ndarray) -> Path:
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


def _read(path: Path, head: np.ndarray) -> Arrays | None:
    """The stored index if it is undamaged and has this header, else None."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return arrays if arrays["head"].tolist() == head.tolist() else None
    except (OSError, ValueError, LookupError, EOFError, BadZipFile, zlib.error):
        return None
