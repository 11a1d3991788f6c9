"""Rows of parquet files, read by row group, and of Arrow files by index."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property, partial
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

from seed_multimodal.data.formats.index import CountedFile, FileEntry
from seed_multimodal.data.formats.record import BadRecord, JsonObject, Record, find_part
from seed_multimodal.data.formats.storage import (
    EXACT_READS,
    DataFile,
    is_remote,
    open_ranges,
    read_safely,
    stat,
)
from seed_multimodal.errors import first_line

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile as ArrowParquet

T = TypeVar("T")
WHOLE_FILE = -1  # row group of Arrow's rows
CACHED_BYTES = 1 << 30  # of row groups in a process
# By number of the file and row group, the last used one last.
_groups: OrderedDict[tuple[int, int], pyarrow.Table] = OrderedDict()


class ParquetFile(CountedFile):
    """The unread rows of a parquet file by index."""

    @cached_property
    def _ends(self) -> list[int]:
        """The end of each row group, in rows."""
        if self.entry is None:
            return self._read_ends()
        size, version = stat(self.path, was_there=True)
        ends = self._read_ends()
        self.check_entry(FileEntry(size, version, sum(ends[-1:])))
        return ends

    def _read_ends(self) -> list[int]:
        metadata = read_parquet(self.path, lambda file: file.metadata)
        groups = range(metadata.num_row_groups)
        return list(accumulate(metadata.row_group(group).num_rows for group in groups))

    def count(self) -> int:
        """Number of rows."""
        return sum(self._ends[-1:])

    def locate(self, row: int) -> Record:
        """An unread record."""
        return self._record(row, *find_part(self._ends, row))

    def _record(self, row: int, group: int, offset: int) -> Record:
        location = f"{self.path}: row {row}"
        read = partial(read_row, self.file, group, offset, location)
        return Record(f"row {row}", location, file=self.path, row=read)


class ArrowFile(ParquetFile):
    """The rows of an Arrow file or stream, as `save_to_disk` of Hugging Face's datasets writes."""

    def _read_ends(self) -> list[int]:
        return [read_arrow(self.path).num_rows]

    def locate(self, row: int) -> Record:
        """An unread record."""
        return self._record(row, WHOLE_FILE, row)


def read_row(file: DataFile, group: int, offset: int, location: str) -> JsonObject:
    """The fields of a row, without nulls; `offset`: in its group. Raises BadRecord."""
    try:
        (row,) = _cached_group(file, group).slice(offset, 1).to_pylist()
    except (ValueError, OverflowError, LookupError) as error:
        # No UTF-8, a date after 9999, an unknown time zone.
        raise BadRecord(
            "wrong type", f"{location}: a value cannot be read ({first_line(error)})."
        ) from None
    return {key: value for key, value in row.items() if value is not None}


def _cached_group(file: DataFile, group: int) -> pyarrow.Table:
    """A row group; the ones used longest ago are dropped."""
    key = (file.number, group)
    if key not in _groups:
        _groups[key] = read_group(file.source, group)
        limit = 0 if file.in_order else CACHED_BYTES
        while len(_groups) > 1 and _cached_bytes() > limit:
            _groups.popitem(last=False)
    _groups.move_to_end(key)
    return _groups[key]


def _cached_bytes() -> int:
    # Whole files are mapped into memory.
    return sum(table.nbytes for (_, group), table in _groups.items() if group != WHOLE_FILE)


def read_group(path: str, group: int) -> pyarrow.Table:
    """A row group of a parquet file, or `WHOLE_FILE` of Arrow."""
    if group == WHOLE_FILE:
        return read_arrow(path)
    # Without threads: Arrow's pool does not survive a fork.
    return read_parquet(path, lambda file: file.read_row_group(group, use_threads=False), True)


def read_parquet(path: str, read: Callable[[ArrowParquet], T], was_there: bool = False) -> T:
    """What `read` returns of a parquet file. Raises as `read_safely`."""
    import pyarrow.parquet

    def read_file() -> T:
        source = open_ranges(path, EXACT_READS) if is_remote(path) else path
        with pyarrow.parquet.ParquetFile(source) as file:
            return read(file)

    return read_safely(path, read_file, Exception, was_there=was_there)  # of Arrow


def read_arrow(path: str) -> pyarrow.Table:
    """The table of an Arrow file or stream; a local one stays on the disk."""
    import pyarrow

    def read_file() -> pyarrow.Table:
        source = open_ranges(path) if is_remote(path) else pyarrow.memory_map(path)
        try:
            return pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(source).read_all()

    return read_safely(path, read_file, Exception)
