"""Random reads from many local and remote files, and copies of the remote ones."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from seed_multimodal.data.formats.parquet import WHOLE_FILE, read_group
from seed_multimodal.data.formats.record import BadRecord, JsonObject
from seed_multimodal.data.formats.storage import (
    LOCAL_FILES,
    REMOTE_FILES,
    RESERVED_SHARE,
    default_cache,
    is_remote,
    local_copy,
    read_range,
    read_safely,
    stat,
)
from seed_multimodal.entry import log_line
from seed_multimodal.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow

GROUP_CACHE_BYTES = 512 << 20  # of row groups that a data worker caches for each source


class OpenFiles:
    """Reads byte ranges and table rows of records.

    cache: as of `sources.open_records`.
    in_order: files are read once from begin to end, remote ones without copies.
    """

    def __init__(self, cache: str | bool | None = None, in_order: bool = False) -> None:
        self.cache = False if in_order else cache
        self.in_order = in_order
        self.group_cache_bytes = 0 if in_order else GROUP_CACHE_BYTES
        self._copies: dict[str, str] = {}  # by URL
        self._groups: OrderedDict[tuple[str, int], pyarrow.Table] = OrderedDict()

    def __getstate__(self) -> JsonObject:
        # A data worker starts without the tables.
        return {**self.__dict__, "_groups": OrderedDict()}

    def read(self, path: str | Path, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset`.

        Raises DataError: missing, not readable, or shorter than before; ReadError.
        """
        source = self._source(path)
        files = REMOTE_FILES if is_remote(source) else LOCAL_FILES
        key = (source, self.in_order)

        def read() -> bytes:
            # A file whose read fails is opened again.
            file = files.take(key)
            data = read_range(file, offset, size)
            files.put(key, file)
            return data

        data = read_safely(source, read)
        if len(data) < size:
            raise DataError(
                f"{path}: shorter than when it was indexed; do not change shards in use."
            )
        return data

    def row(self, path: str | Path, group: int, offset: int, location: str) -> JsonObject:
        """The fields of a row of a table, without nulls. Raises BadRecord: not readable."""
        try:
            (row,) = self._group(self._source(path), group).slice(offset, 1).to_pylist()
        except (ValueError, OverflowError, LookupError) as error:
            # No UTF-8, a date after 9999, an unknown time zone.
            raise BadRecord(
                "wrong type", f"{location}: a value cannot be read ({first_line(error)})."
            ) from None
        return {key: value for key, value in row.items() if value is not None}

    def _group(self, path: str, group: int) -> pyarrow.Table:
        """A row group as an Arrow table; the ones used longest ago are dropped."""
        if (path, group) not in self._groups:
            self._groups[path, group] = read_group(path, group)
            while len(self._groups) > 1 and self._cached_bytes() > self.group_cache_bytes:
                self._groups.popitem(last=False)
        self._groups.move_to_end((path, group))
        return self._groups[path, group]

    def _cached_bytes(self) -> int:
        # Whole files are mapped into memory.
        groups = self._groups.items()
        return sum(table.nbytes for (_, group), table in groups if group != WHOLE_FILE)

    def _source(self, path: str | Path) -> str:
        """The path or URL to read from: a remote file's copy, unless `cache` is False."""
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
            return local_copy(url, os.path.expanduser(self.cache))
        try:
            return local_copy(url, default_cache(), RESERVED_SHARE)
        except DataError as error:
            stat(url)  # raises if the file itself is the reason
            log_line(
                f"{url}: is read by range requests, not copied ({str(error).rstrip('.')}); set "
                "cache to a folder with space."
            )
            return url
