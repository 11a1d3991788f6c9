"""Random reads from many local and remote files, with file handles per process."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.layout import GROUP_CACHE_BYTES
from seed_multimodal.data.formats.parquet import RowGroups
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
        self.limit, self.cache, self.in_order = limit, False if in_order else cache, in_order
        self._owner = os.getpid()
        self._handles: OrderedDict[str, Any] = OrderedDict()
        self._copies: dict[str, str] = {}
        self.tables = RowGroups(group_cache_bytes)

    def read(self, path: str | Path, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset`. Raises DataError: not readable, or the file became shorter."""
        place = self._place(path)
        handle = self._handles.pop(
            place, None
        )  # put back after the read, so a failing one is reopened
        with read_errors(place):
            if handle is None:
                handle = self._open(place)
            data = read_range(handle, offset, size)
            while len(data) < size and (
                more := read_range(handle, offset + len(data), size - len(data))
            ):
                data += more
        self._handles[place] = handle
        if len(self._handles) > self.limit:
            self._handles.popitem(last=False)[1].close()
        if len(data) < size:
            raise DataError(
                f"{path}: shorter than when it was indexed; do not change shards in use."
            )
        return data

    def _open(self, path: str) -> Any:
        if is_remote(path):
            return open_ranges(path, SEQUENTIAL_READS if self.in_order else RANDOM_READS)
        return open(path, "rb", buffering=0)

    def row(self, path: str | Path, group: int, number: int, where: str) -> dict[str, Any]:
        """The fields of a row of a parquet file. Raises BadRecord: not readable."""
        return self.tables.row(self._place(path), group, number, where)

    def close(self) -> None:
        """Close the files of this process and drop cached rows."""
        while self._handles:
            self._handles.popitem()[1].close()
        self.tables.clear()

    def _place(self, path: str | Path) -> str:
        """The path to read from: a remote file's copy if `cache` is set."""
        if self._owner != os.getpid():  # inherited handles share their position with the parent
            self.close()
            self._owner = os.getpid()
        path = str(path)
        if self.cache is False or not is_remote(path):
            return path
        if path not in self._copies:
            self._copies[path] = self._copy(path)
        return self._copies[path]

    def _copy(self, url: str) -> str:
        """The path of a remote file's copy. Without a configured folder the URL, if the copy cannot be kept."""
        if isinstance(self.cache, str):
            return str(local_copy(url, self.cache))
        try:
            copy = local_copy(url, default_cache(), RESERVED_SHARE)
            reason = f"it would leave less than {RESERVED_SHARE:.0%} of the disk free"
        except DataError as error:
            copy, reason = None, str(error).rstrip(".")
        if copy is not None:
            return copy
        stat(url)  # raises if the file itself is the reason
        log_line(
            f"{url}: is read by range requests, not copied ({reason}); set cache to a folder with space."
        )
        return url

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[int, int, str | bool | None, bool]]:
        return OpenFiles, (
            self.limit,
            self.tables.limit_bytes,
            self.cache,
            self.in_order,
        )  # handles are not pickled
