"""Random reads from many local and remote files, with file handles per process."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.layout import CACHED_GROUPS
from seed_multimodal.data.formats.parquet import RowGroups
from seed_multimodal.data.formats.storage import is_remote, local_copy, open_ranges, read_errors
from seed_multimodal.errors import DataError


class OpenFiles:
    """Reads byte ranges and parquet rows; each process (forked worker) has its own handles. `limit`: number of open
    files; `rows`: bytes of cached row groups; `cache`: folder for copies of remote files."""

    def __init__(self, limit: int = 64, rows: int = CACHED_GROUPS, cache: str | None = None) -> None:
        self.limit, self.cache = limit, cache
        self._owner = os.getpid()
        self._handles: OrderedDict[str, Any] = OrderedDict()
        self._copies: dict[str, str] = {}
        self.tables = RowGroups(rows)

    def read(self, path: str | Path, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset`. Raises DataError: not readable, or the file became shorter."""
        place = self._place(path)
        handle = self._handles.pop(place, None)  # put back after the read, so a failing one is reopened
        with read_errors(place):
            if handle is None:
                handle = open_ranges(place) if is_remote(place) else open(place, "rb", buffering=0)
            handle.seek(offset)
            data: bytes = handle.read(size)
            while len(data) < size and (more := handle.read(size - len(data))):
                data += more
        self._handles[place] = handle
        if len(self._handles) > self.limit:
            self._handles.popitem(last=False)[1].close()
        if len(data) < size:
            raise DataError(f"{path}: shorter than when it was indexed; do not change shards in use.")
        return data

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
        if self.cache is None or not is_remote(path):
            return path
        if path not in self._copies:
            self._copies[path] = local_copy(path, self.cache)
        return self._copies[path]

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[int, int, str | None]]:
        return OpenFiles, (self.limit, self.tables.kept, self.cache)  # handles are not pickled
