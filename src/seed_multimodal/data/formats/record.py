"""The record type of all data: readers return it; decoders, pairs and pre-tokenisation accept it.

A record that is not read yet holds only the positions of its parts, so that it can be sent to a worker process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from seed_multimodal.errors import DataError


class Place(NamedTuple):
    """Bytes of a file that are not read yet."""

    file: str
    offset: int
    size: int


class Row(NamedTuple):
    """A row of a parquet file that is not read yet: its row group, and its number there."""

    file: str
    group: int
    number: int


class FileReader(Protocol):
    """Reads a `Place` and a `Row`; implemented by `open_files.OpenFiles`."""

    def read(self, path: str | Path, offset: int, size: int) -> bytes: ...

    def row(self, path: str | Path, group: int, number: int, where: str) -> dict[str, Any]: ...


@dataclass
class Record:
    """One record: the fields of its json or table row, and its other parts."""

    key: str  # of a sample; else `line 12`, `item 3`, `row 3`
    where: str  # `FILE: sample KEY`, `FILE: line 12`, as errors show it
    fields: dict[str, Any] = field(default_factory=dict)
    members: dict[str, bytes | Place] = field(default_factory=dict)  # by extension; `json` until it is parsed
    file: str = ""  # which paths of images may be relative to
    problem: tuple[str, str] | None = None  # (kind, sentence) of a defect that is known before it is read
    row: Row | None = None  # that its fields are, until they are read

    def member(self, *extensions: str, files: FileReader) -> bytes | None:
        """The bytes of the first of these members that the record has; None without any."""
        for extension in extensions:
            if extension in self.members:
                found = self.members[extension]
                return files.read(*found) if isinstance(found, Place) else found
        return None

    def parsed(self, files: FileReader) -> Record:
        """The record with its json member, or its table row, among `fields`. Raises BadRecord."""
        if self.problem is not None:
            raise BadRecord(*self.problem)
        if self.row is not None:
            return Record(self.key, self.where, self.fields | files.row(*self.row, self.where), self.members, self.file)
        data = self.member("json", files=files)
        if data is None:
            return self
        value = parse_json(data, self.where)
        if not isinstance(value, dict):
            raise BadRecord("malformed json", f"{self.where}: holds a {type(value).__name__}, not an object.")
        others = self.members.copy()
        del others["json"]
        return Record(self.key, self.where, value | self.fields, others, self.file)


class BadRecord(DataError):
    """A record that cannot be used; `kind` names the defect in a word or two, for counting."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind

    def __reduce__(self) -> tuple[type[BadRecord], tuple[str, str]]:  # survives the way back from a worker process
        return BadRecord, (self.kind, str(self))


def parse_json(data: bytes | str, where: str) -> Any:
    """Any json value; half a surrogate pair, in which texts cut inside an emoji end, becomes `?`. Raises BadRecord."""
    try:
        data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
        value = json.loads(data)
        if b"\xed" in data or b"\\u" in data and b"\\ud" in data.lower():  # as bytes of their own, or escaped
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        return value
    except UnicodeDecodeError as error:
        raise BadRecord("malformed text", f"{where}: is not UTF-8 ({error.reason}).") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("malformed json", f"{where}: is not json ({error}).") from None


def shorten(value: Any) -> str:
    """A value for an error sentence, cut to a readable length."""
    written = repr(value)
    return written if len(written) <= 60 else written[:57] + "…"


def find_image(path: str, root: str | Path | None = None, beside: str | Path | None = None) -> Path | None:
    """The file of an image below `root`, or without one below the folder of the file `beside`, else the current one.
    A leading slash may mean that folder, as in SEED-X's lists."""
    folders = [Path(root)] if root is not None else [Path(beside).parent if beside else Path(), Path()]
    places = [Path(path)] if Path(path).is_absolute() else []
    places += [folder / path.lstrip("/") for folder in folders]
    return next((place for place in places if os.path.isfile(place)), None)


class RecordFile(Protocol):
    """The records of one file by number; `sizes`: of each piece that is read together."""

    @property
    def path(self) -> str | Path: ...

    @property
    def sizes(self) -> Sequence[int]: ...

    def locate(self, row: int) -> Record:
        """A record, unread where that is possible."""
