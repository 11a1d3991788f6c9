"""Reading pieces of many files, local and remote, each process with its own handles."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.parquet import KEPT, RowGroups
from seed_multimodal.data.formats.storage import is_remote, local_copy, open_ranges, remote_errors
from seed_multimodal.errors import DataError

REMOTE_FILES = 16  # that stay open


class OpenFiles:
    """Reads pieces of files, and rows of parquet files; each process (a forked worker) opens its own.

    Args:
        limit: local files that stay open. rows: bytes of parquet's row groups that are kept.
        cache: folder into which remote files are copied when they are first read; None: they are read by ranges.
    """

    def __init__(self, limit: int = 64, rows: int = KEPT, cache: str | None = None) -> None:
        self.limit, self.cache = limit, cache
        self._owner = os.getpid()
        self._local: OrderedDict[str, int] = OrderedDict()
        self._remote: OrderedDict[str, Any] = OrderedDict()
        self._copies: dict[str, str] = {}
        self.tables = RowGroups(rows)

    def read(self, path: str | Path, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset`. Raises DataError: they cannot be read, or are no longer there."""
        place = self._place(path)
        data = self._read_remote(place, offset, size) if is_remote(place) else self._read_local(place, offset, size)
        if len(data) < size:
            raise DataError(f"{path}: it is shorter than when it was indexed; do not change shards in use.")
        return data

    def row(self, path: str | Path, number: int) -> dict[str, Any]:
        """The fields of a row of a parquet file. Raises BadRecord: it cannot be read."""
        return self.tables.row(self._place(path), number)

    def close(self) -> None:
        """Close what this process holds open, and drop rows kept in memory."""
        while self._local:
            os.close(self._local.popitem()[1])
        self._remote.clear()
        self.tables.clear()

    def _place(self, path: str | Path) -> str:
        """The file to read from: of a remote one its copy, if copies are kept."""
        if self._owner != os.getpid():  # a forked process shares positions in the files that it inherits
            self.close()
            self._owner = os.getpid()
        path = str(path)
        if self.cache is None or not is_remote(path):
            return path
        if path not in self._copies:
            self._copies[path] = local_copy(path, self.cache)
        return self._copies[path]

    def _read_local(self, path: str, offset: int, size: int) -> bytes:
        try:
            if path not in self._local:
                self._local[path] = os.open(path, os.O_RDONLY)
            self._local.move_to_end(path)
            while len(self._local) > self.limit:
                os.close(self._local.popitem(last=False)[1])
            data = os.pread(self._local[path], size, offset)
            while len(data) < size and (more := os.pread(self._local[path], size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
        return data

    def _read_remote(self, url: str, offset: int, size: int) -> bytes:
        with remote_errors(url):
            handle = self._remote.pop(url, None)  # put back when the read succeeds, so that a broken one is reopened
            if handle is None:
                handle = open_ranges(url)
            handle.seek(offset)
            data: bytes = handle.read(size)
            self._remote[url] = handle
            while len(self._remote) > REMOTE_FILES:
                self._remote.popitem(last=False)
            return data

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[int, int, str | None]]:
        return OpenFiles, (self.limit, self.tables.kept, self.cache)  # open files stay behind when a worker is spawned
