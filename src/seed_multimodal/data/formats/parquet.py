"""Rows of parquet files by number."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.record import BadRecord, Record
from seed_multimodal.errors import DataError, first_line


class RowGroups:
    """The row groups last used of a source's files: together, since a source may have thousands of files.

    So many are kept because the local shuffle reads from about ten places at once, twenty where two blocks meet.
    """

    kept = 24

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[Path, int], Any] = OrderedDict()

    def get(self, path: Path, number: int) -> Any:
        """A row group as arrow's table. Raises DataError when it cannot be read."""
        key = path, number
        if key not in self._groups:
            while len(self._groups) >= self.kept:
                self._groups.popitem(last=False)
            with _opened(path) as file:
                # One thread: arrow's thread pool does not survive a fork.
                self._groups[key] = file.read_row_group(number, use_threads=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def clear(self) -> None:
        """Drop them."""
        self._groups.clear()


class ParquetFile:
    """The rows of a parquet file by number; the row groups last used are kept in `groups`."""

    def __init__(self, path: Path, groups: RowGroups | None = None) -> None:
        self.path = path
        self._groups = groups or RowGroups()

    @cached_property
    def sizes(self) -> Sequence[int]:
        """Rows of each row group."""
        with _opened(self.path) as file:
            return [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.sizes))

    def locate(self, row: int) -> Record:
        """A record, read: columns without a value are left out; its key is `rowN`."""
        number = bisect_right(self._ends, row)
        at = row - (self._ends[number] - self.sizes[number])
        try:
            fields = self._groups.get(self.path, number).slice(at, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise BadRecord("wrong type", f"{self.path}: row {row}: a text is not UTF-8 ({error.reason}).") from None
        fields = {key: value for key, value in fields.items() if value is not None}
        return Record(f"row{row}", f"{self.path}: row {row}", fields, file=str(self.path))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A parquet file for one reading; arrow's errors become one sentence."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow (pip install pyarrow).") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise BadRecord("damaged file", f"{path}: cannot be read as parquet ({first_line(error)}).") from None
