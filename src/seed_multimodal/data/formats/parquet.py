"""Rows of parquet files, read by row group, and of Arrow files by index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from seed_multimodal.data.formats.record import BadRecord, Record, TableRow, find_part
from seed_multimodal.data.formats.storage import EXACT_READS, LOCAL_FILES, is_remote, open_ranges
from seed_multimodal.disk import read_patiently
from seed_multimodal.errors import SeedError, first_line, name_content

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile as ArrowParquet

T = TypeVar("T")
WHOLE_FILE = -1  # row group of Arrow's rows


class ParquetFile:
    """The unread rows of a parquet file by index."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    @cached_property
    def _ends(self) -> list[int]:
        """The end of each row group, in rows."""
        metadata = read_parquet(self.path, lambda file: file.metadata)
        groups = range(metadata.num_row_groups)
        return list(accumulate(metadata.row_group(group).num_rows for group in groups))

    @property
    def sizes(self) -> Sequence[int]:
        """One shard with all rows."""
        return self._ends[-1:]

    def locate(self, row: int) -> Record:
        """An unread record."""
        table_row = TableRow(self.path, *find_part(self._ends, row))
        return Record(f"row {row}", f"{self.path}: row {row}", file=self.path, row=table_row)


class ArrowFile(ParquetFile):
    """The rows of an Arrow file or stream, as `save_to_disk` of Hugging Face's datasets writes."""

    @cached_property
    def _ends(self) -> list[int]:
        return [read_arrow(self.path).num_rows]

    def locate(self, row: int) -> Record:
        """An unread record."""
        table_row = TableRow(self.path, WHOLE_FILE, row)
        return Record(f"row {row}", f"{self.path}: row {row}", file=self.path, row=table_row)


def read_group(path: str, group: int) -> pyarrow.Table:
    """A row group of a parquet file, or `WHOLE_FILE` of Arrow."""
    if group == WHOLE_FILE:
        return read_arrow(path)
    # Without threads: Arrow's pool does not survive a fork.
    return read_parquet(path, lambda file: file.read_row_group(group, use_threads=False))


def read_parquet(path: str, read: Callable[[ArrowParquet], T]) -> T:
    """What `read` returns of a parquet file. Raises as `_read_table`."""
    import pyarrow.parquet

    def read_file() -> T:
        source = open_ranges(path, EXACT_READS) if is_remote(path) else path
        with pyarrow.parquet.ParquetFile(source) as file:
            return read(file)

    return _read_table(path, "parquet", read_file)


def read_arrow(path: str) -> pyarrow.Table:
    """The table of an Arrow file or stream; a local one stays on the disk."""
    import pyarrow

    def read_file() -> pyarrow.Table:
        source = open_ranges(path) if is_remote(path) else pyarrow.memory_map(path)
        try:
            return pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(source).read_all()

    return _read_table(path, "Arrow", read_file)


def _read_table(path: str, kind: str, read: Callable[[], T]) -> T:
    """What `read` returns.

    Raises BadRecord: no such file, or damaged; ReadError: a fault of the machine.
    """
    try:
        return read_patiently(path, read, Exception, LOCAL_FILES.close_half)
    except SeedError:
        raise
    except Exception as error:  # noqa: BLE001 of Arrow, the OS or the connection
        reason = name_content(path) or first_line(error)
        raise BadRecord("damaged file", f"{path}: cannot be read as {kind} ({reason}).") from None
