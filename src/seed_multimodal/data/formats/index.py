"""The index of a data file: where each record stands, in one `.npz`.

    beside the file:   FOLDER/.seed-index/NAME.npz, written by `seed data index`, or at the first use
    elsewhere:         SEED_INDEX_DIR, or ~/.cache/seed-multimodal/index for remote files

An index belongs to a file of one size and time of change (beside a remote file: of one size); any other is made again.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from seed_multimodal.data.formats.record import RecordFile
from seed_multimodal.data.formats.storage import filesystem, is_remote, read_all, remote_errors, stat
from seed_multimodal.disk import disk_reason, replacing
from seed_multimodal.entry import log_line
from seed_multimodal.errors import DataError
from seed_multimodal.progress import Progress

FOLDER = ".seed-index"
KEEP_FROM = 1 << 20  # bytes: smaller files beside which no index is written by itself
VERSION = 2
REMOTE_THREADS = 16

Arrays = Mapping[str, np.ndarray]


class IndexedFile:
    """A file whose records are found by an index; base of the readers.

    `kind` names what the index holds; `scan` makes it in one pass.
    """

    kind = ""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._arrays: Arrays | None = None

    def scan(self) -> Arrays:
        """The index, from the file's content. Raises DataError: it cannot be read."""
        raise NotImplementedError

    @property
    def arrays(self) -> Arrays:
        """The index, read or made when it is first needed. Raises DataError as `scan`."""
        if self._arrays is None:
            self._arrays = cached_index(self.path, self.kind, self.scan)
        return self._arrays


def piece_sizes(files: Sequence[RecordFile]) -> list[list[int]]:
    """Records of each piece of each file, for which their indexes are read or made; of remote files several at a time.

    Raises DataError: a file cannot be read.
    """
    log = log_line if os.environ.get("RANK", "0") == "0" else None
    sizes: dict[int, list[int]] = {}
    with ThreadPoolExecutor(REMOTE_THREADS) as pool, Progress("index", len(files), "file", log=log) as bar:
        remote = [number for number, file in enumerate(files) if is_remote(file.path)]
        for number, found in zip(remote, pool.map(lambda number: files[number].sizes, remote), strict=True):
            sizes[number] = [int(size) for size in found]
            bar.update()
        for number, file in enumerate(files):
            if number not in sizes:
                sizes[number] = [int(size) for size in file.sizes]
                bar.update()
    return [sizes[number] for number in range(len(files))]


def cached_index(path: str, kind: str, scan: Callable[[], Arrays]) -> Arrays:
    """The index of a file: the one beside it, the cached one, or a new one, which is cached."""
    size, version = stat(path)
    beside, own = index_beside(path), _own_place(path, size, version)
    head = np.array([kind, str(VERSION), str(size), version])
    for place, about in ((beside, head[:3] if is_remote(path) else head), (own, head)):
        arrays = _read(place, about)
        if arrays is not None:
            return arrays
    arrays = {"head": head, **scan()}
    if os.environ.get("SEED_INDEX_DIR") or is_remote(path) or size >= KEEP_FROM:
        try:
            write_index(beside if own is None else own, arrays)
        except OSError as error:
            log_line(f"{path}: its index cannot be kept ({disk_reason(error)}), so every process makes it again; name "
                     "a folder by SEED_INDEX_DIR.")
    return arrays


def make_index(file: IndexedFile) -> None:
    """Write the index beside a file, if the one there is not the file's own. Raises DataError: one of them cannot be
    read or written."""
    size, version = stat(file.path)
    head = np.array([file.kind, str(VERSION), str(size), version])
    place = index_beside(file.path)
    if _read(place, head) is None:
        try:
            write_index(place, {"head": head, **file.scan()})
        except OSError as error:
            raise DataError(f"{place}: cannot be written ({disk_reason(error)}).") from None


def index_beside(path: str) -> str:
    """Where the index beside a file is."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{FOLDER}/{name}.npz"


def write_index(place: str, arrays: Arrays) -> None:
    """Write an index, whole or not at all. Raises OSError."""
    if is_remote(place):
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        files, name = filesystem(place)
        with remote_errors(place):
            files.pipe_file(name, content.getvalue())
        return
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    with replacing(place) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _own_place(path: str, size: int, version: str) -> str | None:
    """Where the index of a file is cached elsewhere than beside it; None: it is cached beside it."""
    folder = os.environ.get("SEED_INDEX_DIR") or (Path.home() / ".cache/seed-multimodal/index" if is_remote(path)
                                                  else None)
    if folder is None:
        return None
    name = path if is_remote(path) else os.path.realpath(path)
    digest = hashlib.sha256(f"{name} {size} {version}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return str(Path(folder) / f"{path.rpartition('/')[2][:50]}.{digest}.npz")


def _read(place: str | None, head: np.ndarray) -> Arrays | None:
    """An index whose head starts so; None: there is none, or it is another file's."""
    if place is None or not is_remote(place) and not os.path.isfile(place):
        return None
    try:
        with np.load(io.BytesIO(read_all(place)), allow_pickle=False) as found:
            if found["head"][:len(head)].tolist() != head.tolist():
                return None
            return {name: found[name] for name in found.files}
    except (DataError, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
