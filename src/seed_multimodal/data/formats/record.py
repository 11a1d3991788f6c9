"""The record type of all data: readers return it; decoders, pairs and pre-tokenization accept it.

An unread record only has the offsets of its members, so that it can be sent to a worker process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from seed_multimodal.errors import CodesError, DataError, ImageError, first_line


class ByteRange(NamedTuple):
    """Unread bytes of a file."""

    file: str
    offset: int
    size: int


class TableRow(NamedTuple):
    """An unread row of a parquet file: row group and index in it."""

    file: str
    group: int
    number: int


# Errors of an unusable record: it is named, skipped and counted, and only many of them in a row end a run.
RECORD_FAULTS = (CodesError, DataError, ImageError)
# What unexpected values of a record raise in the code that uses them; `bad_values` converts them.
VALUE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class FileReader(Protocol):
    """Reads `ByteRange` and `TableRow`; implemented by `open_files.OpenFiles`."""

    def read(self, path: str | Path, offset: int, size: int) -> bytes: ...

    def row(self, path: str | Path, group: int, number: int, where: str) -> dict[str, Any]: ...


@dataclass
class Record:
    """One record: fields of its JSON object or table row, and its other members."""

    key: str  # sample key, else `line 12`, `item 3`, `row 3`
    location: str  # in errors and logs: `FILE: sample KEY`, `FILE: line 12`
    fields: dict[str, Any] = field(default_factory=dict)
    members: dict[str, bytes | ByteRange] = field(
        default_factory=dict
    )  # by extension; `json` until it is parsed
    file: str = ""  # base of relative image paths
    problem: tuple[str, str] | None = None  # (kind, message) of a defect known before reading
    row: TableRow | None = None  # unread fields

    def member(self, *extensions: str, files: FileReader) -> bytes | None:
        """Content of the first of these members that exists; None without any."""
        for extension in extensions:
            if extension in self.members:
                found = self.members[extension]
                return files.read(*found) if isinstance(found, ByteRange) else found
        return None

    def parsed(self, files: FileReader) -> Record:
        """The record with its JSON member or table row in `fields`. Raises BadRecord."""
        if self.problem is not None:
            raise BadRecord(*self.problem)
        if self.row is not None:
            return Record(
                self.key,
                self.location,
                self.fields | files.row(*self.row, self.location),
                self.members,
                self.file,
            )
        data = self.member("json", files=files)
        if data is None:
            return self
        value = parse_json(data, self.location)
        if not isinstance(value, dict):
            raise BadRecord(
                "malformed json",
                f"{self.location}: is a JSON {type(value).__name__}, not an object.",
            )
        others = self.members.copy()
        del others["json"]
        return Record(self.key, self.location, value | self.fields, others, self.file)


class BadRecord(DataError):
    """An unusable record; `kind`: short name of the defect, for counts."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(
        self,
    ) -> tuple[type[BadRecord], tuple[str, str]]:  # for pickling between processes
        return BadRecord, (self.kind, str(self))


def unusable_value(error: BaseException, where: str) -> BadRecord:
    """The error of a record for one of `VALUE_ERRORS`."""
    reason = f"{type(error).__name__}: {first_line(error)}"
    return BadRecord("unusable value", f"{where}: has a value that cannot be used ({reason}).")


class bad_values(AbstractContextManager[None]):
    """Converts errors of unexpected values (another type, an empty list, NaN) of the record `where` to BadRecord."""

    def __init__(self, where: str) -> None:
        self.location = where

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, VALUE_ERRORS):
            raise unusable_value(error, self.location) from error


def parse_json(data: bytes | str, where: str) -> Any:
    """Any JSON value; lone surrogates (texts truncated inside an emoji) become `?`. Raises BadRecord."""
    try:
        data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
        value = json.loads(data)
        if b"\xed" in data or b"\\u" in data and b"\\ud" in data.lower():  # raw or escaped
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        return value
    except UnicodeDecodeError as error:
        raise BadRecord("malformed text", f"{where}: is not UTF-8 ({error.reason}).") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("malformed json", f"{where}: is not JSON ({error}).") from None


def shorten(value: Any) -> str:
    """A value for an error message, truncated."""
    written = repr(value)
    return written if len(written) <= 60 else written[:57] + "…"


def find_image(
    path: str, root: str | Path | None = None, list_file: str | Path | None = None
) -> Path | None:
    """The file of an image below `root`, by default below the folder of `list_file`, else the current one. As in
    SEED-X's lists, a leading slash may mean that folder."""
    folders = (
        [Path(root)]
        if root is not None
        else [Path(list_file).parent if list_file else Path(), Path()]
    )
    places = [Path(path)] if Path(path).is_absolute() else []
    places += [folder / path.lstrip("/") for folder in folders]
    return next((place for place in places if os.path.isfile(place)), None)


class RecordFile(Protocol):
    """The records of one file by index; `sizes`: number of records of each shard or row group."""

    @property
    def path(self) -> str | Path: ...

    @property
    def sizes(self) -> Sequence[int]: ...

    def locate(self, row: int) -> Record:
        """A record, unread if possible."""
