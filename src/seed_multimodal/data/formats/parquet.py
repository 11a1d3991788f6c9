"""Rows of parquet files by number, read by the row group."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.record import BadRecord, Record, Row
from seed_multimodal.data.formats.storage import is_remote, open_ranges
from seed_multimodal.errors import DataError, SeedError, first_line, how_to_install

KEPT = 512 << 20  # bytes of row groups that are kept
FOOTERS = 64  # files whose footers are kept


class ParquetFile:
    """The rows of a parquet file by number, unread."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    @property
    def sizes(self) -> Sequence[int]:
        """Rows of each row group."""
        return self._about[0]

    @property
    def bytes_of_row(self) -> int:
        """Bytes of a row, on average."""
        return self._about[1] // max(1, sum(self._about[0]))

    @cached_property
    def _about(self) -> tuple[list[int], int]:
        with opened(self.path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            return [group.num_rows for group in groups], sum(group.total_byte_size for group in groups)

    def locate(self, row: int) -> Record:
        """A record, unread; its key is `rowN`."""
        return Record(f"row{row}", f"{self.path}: row {row}", file=self.path, row=Row(self.path, row))


class RowGroups:
    """Reads rows; keeps the row groups last used of all files of a source, up to `kept` bytes (at least one)."""

    def __init__(self, kept: int = KEPT) -> None:
        self.kept, self.held = kept, 0
        self._groups: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._footers: OrderedDict[str, tuple[Any, list[int]]] = OrderedDict()  # and the last row of each group, + 1

    def row(self, path: str, number: int) -> dict[str, Any]:
        """The values of a row; columns without one are left out. Raises BadRecord: it cannot be read."""
        if path not in self._footers:
            with opened(path) as file:
                footer = file.metadata
            sizes = (footer.row_group(group).num_rows for group in range(footer.num_row_groups))
            self._footers[path] = footer, list(accumulate(sizes))
            if len(self._footers) > FOOTERS:
                self._footers.popitem(last=False)
        footer, ends = self._footers[path]
        group = bisect_right(ends, number)
        if group == len(ends):
            raise BadRecord("damaged file", f"{path}: has fewer rows than when it was indexed; do not change files in "
                            "use.")
        try:
            rows = self._group(path, group, footer).slice(number - (ends[group - 1] if group else 0), 1).to_pylist()
        except (ValueError, OverflowError, LookupError) as error:  # no UTF-8, a date after 9999, an unknown time zone
            raise BadRecord("wrong type", f"{path}: row {number}: a value cannot be read ({first_line(error)})."
                            ) from None
        return {key: value for key, value in rows[0].items() if value is not None}

    def clear(self) -> None:
        """Drop what is kept."""
        self._groups.clear()
        self._footers.clear()
        self.held = 0

    def _group(self, path: str, group: int, footer: Any) -> Any:
        """A row group as arrow's table."""
        if (path, group) not in self._groups:
            with opened(path, metadata=footer) as file:
                table = file.read_row_group(group, use_threads=False)  # arrow's thread pool does not survive a fork
            self.held += table.nbytes
            while self._groups and self.held > self.kept:
                self.held -= self._groups.popitem(last=False)[1].nbytes
            self._groups[path, group] = table
        self._groups.move_to_end((path, group))
        return self._groups[path, group]


@contextmanager
def opened(path: str, **options: Any) -> Iterator[Any]:
    """A parquet file for one reading; errors of arrow and of the connection become one sentence."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs the package pyarrow: {how_to_install('pyarrow')}.") from None
    try:
        with pyarrow.parquet.ParquetFile(open_ranges(path) if is_remote(path) else path, **options) as file:
            yield file
    except SeedError:
        raise
    except Exception as error:  # noqa: BLE001  # arrow's, the system's, or of the connection
        raise BadRecord("damaged file", f"{path}: cannot be read as parquet ({first_line(error)}).") from None
