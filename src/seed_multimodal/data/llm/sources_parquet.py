"""Rows of parquet files by number."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from seed_multimodal.data.llm.record import BadRecord
from seed_multimodal.errors import DataError


class ParquetFile:
    """The rows of a parquet file; the row groups last used are kept in memory."""

    kept = 2

    def __init__(self, path: Path) -> None:
        self.path = path
        self._groups: dict[int, Any] = {}

    @cached_property
    def sizes(self) -> Sequence[int]:
        """Rows of each row group."""
        with _parquet(self.path) as file:
            return [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.sizes, dtype=np.int64)

    def read(self, row: int) -> tuple[str, str, dict[str, Any]]:
        """See `RecordFile`. Columns without a value are left out."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        if number not in self._groups:
            while len(self._groups) >= self.kept:
                self._groups.pop(next(iter(self._groups)))
            with _parquet(self.path) as file:
                # One thread: arrow's pool does not live on in forked workers.
                self._groups[number] = file.read_row_group(number, use_threads=False)
        at = row - int(self._ends[number] - self.sizes[number])
        fields = self._groups[number].slice(at, 1).to_pylist()[0]
        fields = {key: value for key, value in fields.items() if value is not None}
        return f"row{row}", f"{self.path}: row {row}", fields


class _parquet:
    """Opens a parquet file for one reading; what arrow says becomes a sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise DataError(f"{self.path}: reading parquet needs pyarrow (pip install pyarrow).") from None
        self._errors = (pyarrow.ArrowException, OSError)
        try:
            self._file = pyarrow.parquet.ParquetFile(self.path)
        except self._errors as error:
            raise self._refusal(error) from None
        return self._file

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._file.close()
        if isinstance(error, self._errors):
            raise self._refusal(error) from None

    def _refusal(self, error: BaseException) -> DataError:
        return BadRecord("damaged file", f"{self.path}: cannot be read as parquet ({str(error).splitlines()[0]}).")
