"""Data files on disk or at any fsspec URL (`s3://`, `gs://`, `hf://`, `https://`, `memory://`).

Remote files are read from local copies, or by range requests: small records through fsspec's block
cache, others exactly. Keys, end points and regions are fsspec settings, from the environment or
~/.config/fsspec.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import resource
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from seed_multimodal.disk import (
    atomic_path,
    folder_lock,
    is_machine_fault,
    path_type,
    raise_file_limit,
    read_patiently,
    reading_reason,
    writing,
)
from seed_multimodal.entry import log_line
from seed_multimodal.errors import DataError, ReadError, SeedError, name_content

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")
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
MAX_LOCAL = 8192  # open files, if the system's limit allows twice as many
MAX_REMOTE = 128  # each with up to 4 MiB of cached blocks
Key = tuple[str, bool]  # path or URL, and whether it is read in order
# What object stores and file systems call the version of a file, in fsspec's `info`.
VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created")


def is_remote(path: str | Path) -> bool:
    """Whether it is a URL."""
    return "://" in str(path)


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of a URL, and the path in it."""
    import fsspec

    files, path = fsspec.core.url_to_fs(url)
    return files, path


class HandleCache:
    """The files that this process used last, at most `limit`."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._files: OrderedDict[Key, IO[bytes]] = OrderedDict()  # the last used one last

    @cached_property
    def limit(self) -> int:
        """By default half of what the system allows, after raising its soft limit."""
        if self._limit is not None:
            return self._limit
        allowed = raise_file_limit()
        return MAX_LOCAL if allowed == resource.RLIM_INFINITY else min(MAX_LOCAL, allowed // 2)

    def take(self, key: Key) -> IO[bytes]:
        """The file, opened if necessary; nobody else has it until `put`."""
        file = self._files.pop(key, None)
        if file is not None:
            return file
        path, in_order = key
        if is_remote(path):
            return open_ranges(path, SEQUENTIAL_READS if in_order else RANDOM_READS)
        return open(path, "rb", buffering=0)

    def put(self, key: Key, file: IO[bytes]) -> None:
        """Keep a file that was read without an error."""
        replaced = self._files.pop(key, None)  # opened by another thread
        if replaced is not None:
            replaced.close()
        self._files[key] = file
        self.close_oldest(self.limit)

    def close_oldest(self, n_left: int) -> None:
        """Close all but the last used files."""
        while len(self._files) > n_left:
            _, oldest = self._files.popitem(last=False)
            oldest.close()

    def close_half(self) -> None:
        """Free handles that the process lacks elsewhere."""
        self.close_oldest(len(self._files) // 2)

    def forget(self) -> None:
        """Drop the files, whose connections belong to the parent process."""
        self._files = OrderedDict()


LOCAL_FILES = HandleCache()
REMOTE_FILES = HandleCache(MAX_REMOTE)
os.register_at_fork(after_in_child=REMOTE_FILES.forget)


_numbers = itertools.count()


class DataFile:
    """A file or URL that records are read from.

    cache: folder for copies of remote files. None: `default_cache`, where there is space; False: no
        copies, range requests.
    in_order: it is read once from begin to end, without a copy.
    joined: VQA's annotations get the questions of the official file beside them.
    """

    def __init__(
        self,
        path: str | Path,
        cache: str | bool | None = None,
        in_order: bool = False,
        joined: bool = True,
    ) -> None:
        self.path = str(path)
        self.cache = False if in_order else cache
        self.in_order = in_order
        self.joined = joined
        self.number = next(_numbers)  # of opened files in this process, also in its workers

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`.

        Raises DataError: missing, not readable, or shorter than before; ReadError.
        """
        key = (self.source, self.in_order)
        files = REMOTE_FILES if is_remote(self.source) else LOCAL_FILES

        def read() -> bytes:
            # A file whose read fails is opened again.
            file = files.take(key)
            data = read_range(file, offset, size)
            files.put(key, file)
            return data

        data = read_safely(self.source, read, was_there=True)
        if len(data) < size:
            raise DataError(
                f"{self.path}: shorter than when it was indexed; do not change shards in use."
            )
        return data

    @cached_property
    def source(self) -> str:
        """The path or URL to read from: a remote file's copy, if it can be kept."""
        if self.cache is False or not is_remote(self.path):
            return self.path
        if isinstance(self.cache, str):
            return local_copy(self.path, os.path.expanduser(self.cache))
        try:
            return local_copy(self.path, default_cache(), RESERVED_SHARE)
        except DataError as error:
            stat(self.path)  # raises if the file itself is the reason
            log_line(
                f"{self.path}: is read by range requests, not copied "
                f"({str(error).rstrip('.')}); set cache to a folder with space."
            )
            return self.path


class FileReader:
    """Base of the readers of a file; `files`: those that are read."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self.path = file.path
        self.files = [file.path]


def read_safely(
    path: str | Path,
    read: Callable[[], T],
    failures: type[Exception] = OSError,
    *,
    was_there: bool = False,
    action: str = "read",
) -> T:
    """The result of `read`, tried again at faults of the machine (`disk.read_patiently`).

    failures: errors of reading; of a URL all are, of any client library.
    was_there: the file was read before, so that a missing one is a fault of the machine, too.
    action: read or written, for messages.

    Raises DataError: the file is missing or cannot be read; ReadError: the fault remains.
    """
    if is_remote(path):
        failures = Exception

    def read_once() -> T:
        try:
            return read()
        except FileNotFoundError as error:
            if not was_there:
                raise
            raise OSError(errno.ESTALE, "it is missing, but was there before") from error

    try:
        return read_patiently(path, read_once, failures, LOCAL_FILES.close_half, action)
    except SeedError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except failures as error:
        reason = name_content(path) or reading_reason(error)
        raise DataError(f"{path}: cannot be {action} ({reason}).") from error


def open_binary(path: str | Path) -> IO[bytes]:
    """A file for sequential reads. Raises as `open`."""
    return open_ranges(str(path), SEQUENTIAL_READS) if is_remote(path) else open(path, "rb")


def open_ranges(url: str, reads: Mapping[str, object] = RANDOM_READS) -> IO[bytes]:
    """A remote file for range requests. Raises errors of its client library."""
    files, name = filesystem(url)
    handle: IO[bytes] = files.open(name, "rb", **reads)
    return handle


def read_range(file: Any, offset: int, size: int) -> bytes:
    """Bytes of a local file, or of one of `open_ranges`; fewer at its end.

    As many as a block or more are read by one exact request, unless in order.
    """
    if isinstance(file, FileIO):  # a local file, whose position forked processes share
        return os.pread(file.fileno(), size, offset)  # at most 2 GiB
    cache = getattr(getattr(file, "cache", None), "name", "")
    # The block cache would fetch all blocks of a large range one after another.
    if size >= BLOCK_BYTES and cache == RANDOM_READS["cache_type"]:
        part: bytes = file.fs.cat_file(file.path, start=offset, end=offset + size)
        return part
    file.seek(offset)
    content: bytes = file.read(size)
    return content


def read_all(path: str | Path) -> bytes:
    """The content of a file. Raises as `read_safely`."""

    def read() -> bytes:
        with open_binary(path) as file:
            return file.read()

    return read_safely(path, read)


def by_folder(paths: Iterable[str], n_files: int) -> dict[str, dict[str, str]]:
    """Folder → name → path, of the folders with at least `n_files` of these paths."""
    paths_of: dict[str, dict[str, str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        paths_of.setdefault(folder, {})[name] = path
    return {folder: files for folder, files in paths_of.items() if len(files) >= n_files}


def list_files(folder: str | Path) -> list[str]:
    """The files at any depth below a folder, without hidden ones, sorted.

    Links to folders are followed, to each folder once.
    """
    if is_remote(folder):
        return [path for path in remote_files(str(folder), "find") if "/." not in path]
    return read_safely(folder, lambda: _local_files(folder))


def _local_files(folder: str | Path) -> list[str]:
    paths = []
    visited = set()
    folders = [os.fspath(folder)]
    while folders:
        parent = folders.pop()
        target = os.path.realpath(parent)
        if target in visited:
            continue
        visited.add(target)
        try:
            types = entry_types(parent)
        except OSError as error:
            if is_machine_fault(error):
                raise
            raise DataError(f"{parent}: cannot be read ({reading_reason(error)}).") from error
        names = [name for name in types if not name.startswith(".")]
        paths += [os.path.join(parent, name) for name in names if types[name] == "file"]
        subfolders = [os.path.join(parent, name) for name in names if types[name] == "folder"]
        folders += reversed(subfolders)
    return sorted(paths, key=lambda path: path.split(os.sep))


def entry_types(folder: str | Path) -> dict[str, str]:
    """Name → type, as of `disk.path_type`, of each entry of a folder, by one listing.

    Only links need a further call each. Raises OSError, ReadError.
    """
    types = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                types[entry.name] = "file"
            elif entry.is_dir(follow_symlinks=False):
                types[entry.name] = "folder"
            else:
                types[entry.name] = path_type(entry.path)
    return types


def remote_files(url: str, method: str) -> list[str]:
    """The files that `glob` or `find` of a URL's file system returns, sorted."""

    def find() -> list[str]:
        files, name = filesystem(url)
        files.invalidate_cache()  # other processes may have written since
        return sorted(map(files.unstrip_protocol, getattr(files, method)(name)))

    return read_safely(url, find)


def stat(path: str | Path, was_there: bool = False) -> tuple[int, str]:
    """Size in bytes and version (modification time or ETag). Raises as `read_safely`."""

    def read() -> tuple[int, str]:
        if not is_remote(path):
            status = os.stat(path)
            return status.st_size, str(status.st_mtime_ns)
        files, name = filesystem(str(path))
        return _size_and_version(files.info(name))

    return read_safely(path, read, was_there=was_there)


def _size_and_version(info: Mapping[str, Any]) -> tuple[int, str]:
    versions = filter(None, map(info.get, VERSION_KEYS))
    return int(info["size"]), str(next(versions, ""))


def stat_files(folder: str, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Name → `stat` of the files of a folder, of a remote one by one listing.

    Missing are files that cannot be read, and those that a server does not list with their sizes.
    Its listing may have other versions than `stat`.
    """
    stats = {}
    if not is_remote(folder):
        for name in names:
            with contextlib.suppress(DataError):
                stats[name] = stat(os.path.join(folder, name))
        return stats

    def list_folder() -> None:
        files, path = filesystem(folder)
        for info in filter(lambda info: info["size"], files.ls(path, detail=True)):
            stats[info["name"].rpartition("/")[2]] = _size_and_version(info)

    with contextlib.suppress(DataError, ReadError):
        read_safely(folder, list_folder)
    return stats


def upload(file: Path, url: str, mode: str = "wb") -> None:
    """Write a local file to a URL. Raises as `read_safely`.

    mode: `wb`, or `xb`: an existing file stays.
    """
    import fsspec

    def write() -> None:
        with contextlib.suppress(FileExistsError), fsspec.open(url, mode) as target:
            target.write(file.read_bytes())

    read_safely(url, write, action="written")


def download(url: str, names: Sequence[str], folder: Path) -> None:
    """Copy files below a URL to a folder, many at a time. Raises as `read_safely`."""

    def read() -> None:
        files, root = filesystem(url)
        files.get([f"{root}/{name}" for name in names], [f"{folder}/{name}" for name in names])

    read_safely(url, read)


def default_cache() -> Path:
    """The folder of copies of remote files, if none is configured."""
    folder = os.environ.get("SEED_CACHE_DIR")
    return Path(folder or Path.home() / ".cache/seed-multimodal/files")


def local_copy(url: str, folder: str | Path, reserve: float = 0.0) -> str:
    """The copy of the current version of a remote file, downloaded on first use.

    reserve: share of the disk that must stay free.

    Raises DataError: not readable, not writable, or too large; ReadError.
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
            raise DataError(f"{copy}: would leave less than {reserve:.0%} of the disk free.")
        files, name = filesystem(url)

        def download() -> None:
            files.get_file(name, str(temporary))
            if temporary.stat().st_size != size:
                raise ConnectionError("the connection was lost while copying")

        with writing(copy, DataError), atomic_path(copy) as temporary:
            read_safely(url, download)
    return str(copy)
