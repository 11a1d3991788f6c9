"""Rows of parquet files by number, read by the row group, or by pieces of one that is too large for the memory."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from seed_multimodal.data.formats.index_file import Arrays, IndexedFile, Scan
from seed_multimodal.data.formats.record import BadRecord, Record, Row
from seed_multimodal.errors import DataError, first_line, how_to_install

# Bytes. The local shuffle reads from about ten places at once, twenty where two blocks meet: so many row groups of
# WHOLE bytes, or pieces of larger ones, are kept.
KEPT = 512 << 20
WHOLE = KEPT // 20
PIECE = WHOLE // 3
LAYOUTS, PIECES = 64, 4096  # files whose footers are kept; pieces: each takes 1 KB beside its rows, which may be few
_BUFFER = 1 << 20


class ParquetFile(IndexedFile):
    """The rows of a parquet file by number, unread."""

    kind = "parquet"

    def scans(self) -> Sequence[Scan]:
        """One: the file's footer."""
        return [partial(_rows_of_groups, self.path)]

    @property
    def sizes(self) -> Sequence[int]:
        """Rows of each row group. Raises BadRecord: it cannot be read as parquet."""
        return list(self.arrays["rows"].tolist())

    def bytes_of_row(self) -> int:
        """Bytes of a row, on average."""
        with opened(self.path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            return sum(group.total_byte_size for group in groups) // max(1, file.metadata.num_rows)

    def locate(self, row: int) -> Record:
        """A record, unread; its key is `rowN`."""
        return Record(f"row{row}", f"{self._name}: row {row}", file=self._name, row=Row(self._name, row))


def _rows_of_groups(path: Path) -> Arrays:
    with opened(path) as file:
        rows = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
    return {"rows": np.array(rows, np.int64)}


class RowGroups:
    """Reads rows; keeps the row groups last used of all files of a source, of which there may be thousands.

    A row group of more than `WHOLE` bytes is never held as a whole but in pieces of about `PIECE` bytes, and read on
    from where its last piece ended: reading in order costs one pass, each step back reads it anew from its start.

    Args:
        kept: bytes that are kept (one row group or piece is, in any case).
    """

    def __init__(self, kept: int = KEPT) -> None:
        self.kept, self.held = kept, 0
        self._pieces: OrderedDict[tuple[str, int, int], Any] = OrderedDict()
        self._layouts: OrderedDict[str, _Layout] = OrderedDict()
        self._running: OrderedDict[tuple[str, int], tuple[int, Iterator[Any]]] = OrderedDict()  # next piece, the rest

    def row(self, path: str, number: int) -> dict[str, Any]:
        """The values of a row; columns without one are left out.

        Raises:
            BadRecord: its row group cannot be read or is no longer there, or Python has no such value.
        """
        group, piece, place = self._layout(path).find(number)
        try:
            found: list[dict[str, Any]] = self.get(path, group, piece).slice(place, 1).to_pylist()
        except UnicodeDecodeError as error:
            raise BadRecord("malformed text", f"{path}: row {number}: a text is not UTF-8 ({error.reason}).") from None
        except (ValueError, OverflowError, LookupError) as error:  # a date after 9999, an unknown time zone
            raise BadRecord("wrong type", f"{path}: row {number}: a value cannot be read ({first_line(error)})."
                            ) from None
        if not found:
            raise _shorter(path)
        return {key: value for key, value in found[0].items() if value is not None}

    def get(self, path: str, group: int, piece: int = 0) -> Any:
        """A piece of a row group as arrow's table. Raises BadRecord when it cannot be read."""
        key = path, group, piece
        if key not in self._pieces:
            layout = self._layout(path)
            rows = layout.rows_of_piece[group]
            table = self._read_piece(path, group, piece, rows) if rows else _whole_group(path, group, layout.metadata)
            self.held += table.nbytes
            while self._pieces and (self.held > self.kept or len(self._pieces) >= PIECES):
                self.held -= self._pieces.popitem(last=False)[1].nbytes
            self._pieces[key] = table
        self._pieces.move_to_end(key)
        return self._pieces[key]

    def clear(self) -> None:
        """Drop them."""
        self._pieces.clear()
        self._layouts.clear()
        self._running.clear()
        self.held = 0

    def _layout(self, path: str) -> _Layout:
        if path not in self._layouts:
            with opened(path) as file:
                self._layouts[path] = _Layout(path, file.metadata)
            while len(self._layouts) > LAYOUTS:
                self._layouts.popitem(last=False)
        self._layouts.move_to_end(path)
        return self._layouts[path]

    def _read_piece(self, path: str, group: int, piece: int, rows: int) -> Any:
        following, rest = self._running.pop((path, group), (0, None))
        if rest is None or following > piece:
            following, rest = 0, _pieces(path, group, rows)
        for number in range(following, piece + 1):
            table = next(rest, None)
            if table is None:
                raise _shorter(path)
            self._running[path, group] = number + 1, rest
        while len(self._running) > 4:
            self._running.popitem(last=False)
        return table


class _Layout:
    """Where the rows of a file are: `rows_of_piece` of each row group, 0: it is read as a whole."""

    def __init__(self, path: str, metadata: Any) -> None:
        self.path, self.metadata = path, metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self.ends = list(accumulate(group.num_rows for group in groups))
        self.rows_of_piece = [max(1, group.num_rows * PIECE // group.total_byte_size)
                              if group.total_byte_size > WHOLE else 0 for group in groups]

    def find(self, number: int) -> tuple[int, int, int]:
        """(row group, its piece, place in the piece) of a row. Raises BadRecord: there is no such row."""
        group = bisect_right(self.ends, number)
        if group == len(self.ends):
            raise _shorter(self.path)
        place = number - (self.ends[group - 1] if group else 0)
        rows = self.rows_of_piece[group]
        return (group, *divmod(place, rows)) if rows else (group, 0, place)


def _shorter(path: str) -> BadRecord:
    return BadRecord("damaged file", f"{path}: has fewer rows than when it was indexed; do not change files in use.")


def _whole_group(path: str, group: int, metadata: Any) -> Any:
    with opened(path, metadata=metadata) as file:
        return file.read_row_group(group, use_threads=False)  # arrow's thread pool does not survive a fork


def _pieces(path: str, group: int, rows: int) -> Iterator[Any]:
    """The pieces of a row group, read through a small buffer."""
    with opened(path, buffer_size=_BUFFER, pre_buffer=False) as file:
        yield from file.iter_batches(rows, [group], use_threads=False)


@contextmanager
def opened(path: str | Path, **options: Any) -> Iterator[Any]:
    """A parquet file for one reading; arrow's errors become one sentence."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs the package pyarrow: {how_to_install('pyarrow')}.") from None
    try:
        with pyarrow.parquet.ParquetFile(path, **options) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise BadRecord("damaged file", f"{path}: cannot be read as parquet ({first_line(error)}).") from None
