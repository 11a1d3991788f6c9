"""Data files on disk or at any fsspec URL (`s3://`, `gs://`, `hf://`, `https://`, `memory://`).

Remote files are read from local copies, or by range requests: small records through fsspec's block
cache, others exactly. Keys, end points and regions are fsspec settings, from the environment or
~/.config/fsspec.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from seed_multimodal.disk import atomic_path, folder_lock, writing
from seed_multimodal.errors import DataError, SeedError, first_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

BLOCK_BYTES = 1 << 16  # of a block in fsspec's cache
CACHED_BLOCKS = 64  # of each remote file
RESERVED_SHARE = 0.05  # share of a disk that copies in the default folder leave free
SCAN_BLOCK_BYTES = 8 << 20  # of a request in sequential reads
# How a remote file is read: small records at random, records in order, or large parts at random.
RANDOM_READS: dict[str, object] = {
    "block_size": BLOCK_BYTES,
    "cache_type": "blockcache",
    "cache_options": {"maxblocks": CACHED_BLOCKS},
}
SEQUENTIAL_READS: dict[str, object] = {"block_size": SCAN_BLOCK_BYTES, "cache_type": "readahead"}
EXACT_READS: dict[str, object] = {"cache_type": "none"}
# What object stores and file systems call the version of a file, in fsspec's `info`.
VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created")


def is_remote(path: str | Path) -> bool:
    """Whether it is a URL."""
    return "://" in str(path)


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of a URL, and the path in it."""
    import fsspec

    with read_errors(url):
        files, path = fsspec.core.url_to_fs(url)
        return files, path


class read_errors(AbstractContextManager[None]):
    """Converts errors of the OS or of fsspec's client libraries into DataError."""

    def __init__(self, path: str | Path) -> None:
        self.path = path

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        expected = Exception if is_remote(self.path) else OSError
        if isinstance(error, SeedError) or not isinstance(error, expected):
            return
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{self.path}: no such file.") from None
        reason = first_line(error)
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise DataError(f"{self.path}: cannot be read ({reason}).") from error


def open_binary(path: str | Path) -> IO[bytes]:
    """A file for sequential reads. Raises DataError."""
    if is_remote(path):
        return open_ranges(str(path), SEQUENTIAL_READS)
    with read_errors(path):
        return open(path, "rb")


def open_ranges(url: str, reads: Mapping[str, object] = RANDOM_READS) -> IO[bytes]:
    """A remote file for range requests. Raises DataError."""
    files, name = filesystem(url)
    with read_errors(url):
        handle: IO[bytes] = files.open(name, "rb", **reads)
        return handle


def read_range(file: Any, offset: int, size: int) -> bytes:
    """Bytes of a local file, or of one of `open_ranges`.

    As many as a block or more are read by one exact request, unless in order.
    """
    # The block cache would fetch all blocks of a large range one after another.
    cache = getattr(getattr(file, "cache", None), "name", "")  # a local file has none
    if size >= BLOCK_BYTES and cache == RANDOM_READS["cache_type"]:
        part: bytes = file.fs.cat_file(file.path, start=offset, end=offset + size)
        return part
    file.seek(offset)
    data: bytes = file.read(size)
    return data


def read_all(path: str | Path) -> bytes:
    """The content of a file. Raises DataError: not readable."""
    with read_errors(path), open_binary(path) as file:
        return file.read()


def stat(path: str | Path) -> tuple[int, str]:
    """Size in bytes and version (modification time or ETag). Raises DataError: missing file."""
    with read_errors(path):
        if not is_remote(path):
            status = os.stat(path)
            return status.st_size, str(status.st_mtime_ns)
        files, name = filesystem(str(path))
        info = files.info(name)
        versions = filter(None, map(info.get, VERSION_KEYS))
        return int(info["size"]), str(next(versions, ""))


def default_cache() -> Path:
    """The folder of copies of remote files, if none is configured."""
    folder = os.environ.get("SEED_CACHE_DIR")
    return Path(folder or Path.home() / ".cache/seed-multimodal/files")


def local_copy(url: str, folder: str | Path, reserve: float = 0.0) -> str | None:
    """The copy of the current version of a remote file, downloaded on first use.

    reserve: share of the disk that must stay free; None is returned if it would not.

    Raises DataError: not readable, or not writable.
    """
    size, version = stat(url)
    digest = hashlib.sha256(f"{url} {size} {version}".encode()).hexdigest()[:16]
    copy = Path(folder) / f"{digest}.{url.rpartition('/')[2][-100:]}"
    if copy.is_file():
        return str(copy)

    # One process at a time downloads; the others then find the copy.
    with folder_lock(copy.parent, DataError, timeout=-1, name=f".{copy.name}.lock"):
        if copy.is_file():
            return str(copy)
        disk = shutil.disk_usage(copy.parent)
        if disk.free - size < reserve * disk.total:
            return None
        files, name = filesystem(url)
        with writing(copy, DataError), atomic_path(copy) as temporary, read_errors(url):
            files.get_file(name, str(temporary))
            if temporary.stat().st_size != size:
                raise DataError(f"{url}: the connection was lost while copying.")
    return str(copy)
