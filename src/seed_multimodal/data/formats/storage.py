"""Data files on disk or at any fsspec URL (`s3://`, `gs://`, `hf://`, `https://`, `memory://`).

Remote files are read by range requests through fsspec's block cache, or from local copies. Keys, end points and regions
are fsspec settings, from the environment or ~/.config/fsspec.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from seed_multimodal.disk import disk_reason, replacing_path
from seed_multimodal.errors import DataError, SeedError, first_line

BLOCK, BLOCKS = 1 << 20, 4  # bytes of a range request, cached requests per remote file
SCAN_BLOCK = 8 << 20  # bytes of a request in sequential reads


def is_remote(path: str | Path) -> bool:
    """Whether it is a URL."""
    return "://" in str(path)


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    import fsspec

    with read_errors(url):
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
        return found


class read_errors(AbstractContextManager[None]):
    """Converts errors of the OS or of fsspec's client libraries into DataError."""

    def __init__(self, path: str | Path) -> None:
        self.path = path

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SeedError) or not isinstance(error, Exception if is_remote(self.path) else OSError):
            return
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{self.path}: no such file.") from None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise DataError(f"{self.path}: cannot be read ({reason}).") from error


def open_binary(path: str | Path) -> IO[bytes]:
    """A file for sequential reads. Raises DataError."""
    with read_errors(path):
        if not is_remote(path):
            return open(path, "rb")
        files, name = filesystem(str(path))
        handle: IO[bytes] = files.open(name, "rb", block_size=SCAN_BLOCK, cache_type="readahead")
        return handle


def open_ranges(url: str) -> Any:
    """A remote file for random reads, with a block cache. Raises DataError."""
    files, name = filesystem(url)
    with read_errors(url):
        return files.open(name, "rb", block_size=BLOCK, cache_type="blockcache", cache_options={"maxblocks": BLOCKS})


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
        about = files.info(name)
        versions = (about.get(key) for key in ("ETag", "etag", "mtime", "LastModified", "last_modified", "created"))
        return int(about["size"]), str(next(filter(None, versions), ""))


def local_copy(url: str, folder: str | Path) -> str:
    """The copy of the current version of a remote file, downloaded on first use."""
    size, version = stat(url)
    digest = hashlib.sha256(f"{url} {size} {version}".encode()).hexdigest()[:16]
    copy = Path(folder) / f"{digest}.{url.rpartition('/')[2][-100:]}"
    if copy.is_file():
        return str(copy)
    files, name = filesystem(url)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replacing_path(copy) as scratch, read_errors(url):
            files.get_file(name, str(scratch))
            if scratch.stat().st_size != size:
                raise DataError(f"{url}: the connection was lost while copying.")
    except OSError as error:
        raise DataError(f"{copy}: cannot be written ({disk_reason(error)}).") from error
    return str(copy)
