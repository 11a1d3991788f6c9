"""Random reads from many local and remote files, with file handles per process."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import IO

from seed_multimodal.data.formats.parquet import GROUP_CACHE_BYTES, RowGroups
from seed_multimodal.data.formats.record import JsonObject
from seed_multimodal.data.formats.storage import (
    RANDOM_READS,
    RESERVED_SHARE,
    SEQUENTIAL_READS,
    default_cache,
    is_remote,
    local_copy,
    open_ranges,
    read_errors,
    read_range,
    stat,
)
from seed_multimodal.entry import log_line
from seed_multimodal.errors import DataError


class OpenFiles:
    """Reads byte ranges and parquet rows; each process (forked worker) has its own handles.

    limit: number of open files.
    group_cache_bytes: bytes of cached row groups.
    cache: as of `sources.open_records`.
    in_order: remote files are read once from begin to end, without copies.
    """

    def __init__(
        self,
        limit: int = 64,
        group_cache_bytes: int = GROUP_CACHE_BYTES,
        cache: str | bool | None = None,
        in_order: bool = False,
    ) -> None:
        self.limit = limit
        self.cache = False if in_order else cache
        self.in_order = in_order
        self.tables = RowGroups(group_cache_bytes)
        self._process_id = os.getpid()
        self._handles: OrderedDict[str, IO[bytes]] = OrderedDict()  # the last used one last
        self._copies: dict[str, str] = {}  # by URL

    def read(self, path: str | Path, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset`.

        Raises DataError: not readable, or the file became shorter.
        """
        source = self._source(path)
        # The handle is put back after the read, so that a failing one is opened again.
        handle = self._handles.pop(source, None)
        with read_errors(source):
            if handle is None:
                handle = self._open(source)
            data = read_range(handle, offset, size)
            # Files without a buffer may return a part.
            while len(data) < size:
                more = read_range(handle, offset + len(data), size - len(data))
                if not more:
                    break
                data += more
        self._handles[source] = handle
        if len(self._handles) > self.limit:
            _, oldest = self._handles.popitem(last=False)
            oldest.close()

        if len(data) < size:
            raise DataError(
                f"{path}: shorter than when it was indexed; do not change shards in use."
            )
        return data

    def _open(self, path: str) -> IO[bytes]:
        if is_remote(path):
            return open_ranges(path, SEQUENTIAL_READS if self.in_order else RANDOM_READS)
        return open(path, "rb", buffering=0)

    def row(self, path: str | Path, group: int, offset: int, location: str) -> JsonObject:
        """The fields of a row of a parquet file. Raises BadRecord: not readable."""
        return self.tables.row(self._source(path), group, offset, location)

    def close(self) -> None:
        """Close the files of this process and drop cached rows."""
        while self._handles:
            _, handle = self._handles.popitem()
            handle.close()
        self.tables.clear()

    def _source(self, path: str | Path) -> str:
        """The path or URL to read from: a remote file's copy, unless `cache` is False."""
        if self._process_id != os.getpid():
            # Handles of before a fork share their position with the parent process.
            self.close()
            self._process_id = os.getpid()
        path = str(path)
        if self.cache is False or not is_remote(path):
            return path
        if path not in self._copies:
            self._copies[path] = self._copy(path)
        return self._copies[path]

    def _copy(self, url: str) -> str:
        """The path of a remote file's copy.

        Without a configured folder, the URL if the copy cannot be kept.
        """
        if isinstance(self.cache, str):
            return str(local_copy(url, self.cache))
        reason = f"it would leave less than {RESERVED_SHARE:.0%} of the disk free"
        try:
            copy = local_copy(url, default_cache(), RESERVED_SHARE)
        except DataError as error:
            copy = None
            reason = str(error).rstrip(".")
        if copy is not None:
            return copy
        stat(url)  # raises if the file itself is the reason
        log_line(
            f"{url}: is read by range requests, not copied ({reason}); set cache to a folder with "
            "space."
        )
        return url

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[int, int, str | bool | None, bool]]:
        # Handles are not pickled.
        return OpenFiles, (self.limit, self.tables.limit_bytes, self.cache, self.in_order)
