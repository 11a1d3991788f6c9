"""The record type of all data: readers return it; decoders, pairs and pre-tokenization accept it.

An unread record has only the offsets of its members, so that it can be sent to a worker process.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from seed_multimodal.disk import JsonObject as JsonObject
from seed_multimodal.errors import DataError

FieldValue = Any  # of JSON or YAML, bytes of tables, or a function that renders an image
RecordFields = Mapping[str, FieldValue]


@dataclass
class Record:
    """One record: fields of its JSON object or table row, and its other members.

    What is unread is a function that reads it; it can be sent to a worker process.
    """

    key: str  # sample key, else `line 12`, `item 3`, `row 3`
    location: str  # in errors and logs: `FILE: sample KEY`, `FILE: line 12`
    fields: JsonObject = field(default_factory=dict)
    members: dict[str, bytes | Callable[[], bytes]] = field(default_factory=dict)  # by extension
    file: str = ""  # base of relative image paths
    problem: tuple[str, str] | None = None  # kind and message of a defect found before reading
    row: Callable[[], JsonObject] | None = None  # further fields, of a table

    def member(self, *extensions: str) -> bytes | None:
        """Content of the first of these members that exists; None without any."""
        for extension in extensions:
            content = self.members.get(extension)
            if content is not None:
                return content if isinstance(content, bytes) else content()
        return None

    def parsed(self) -> Record:
        """The record with its JSON member or table row in `fields`. Raises BadRecord."""
        if self.problem is not None:
            raise BadRecord(*self.problem)
        fields: FieldValue = {}
        members = self.members
        if self.row is not None:
            fields = self.row()
        elif "json" in members:
            fields = parse_json(self.member("json") or b"", self.location)
            members = {name: content for name, content in members.items() if name != "json"}
        if not isinstance(fields, dict):
            raise BadRecord(
                "malformed json",
                f"{self.location}: is a JSON {type(fields).__name__}, not an object.",
            )
        return Record(self.key, self.location, fields | self.fields, members, self.file)


class BadRecord(DataError):
    """An unusable record; `kind`: short name of the defect, for counts."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[BadRecord], tuple[str, str]]:
        # For pickling between processes.
        return BadRecord, (self.kind, str(self))


def parse_json(data: bytes | str, location: str) -> FieldValue:
    """Any JSON value. Raises BadRecord.

    Lone surrogates (of texts that were truncated inside an emoji) become `?`.
    """
    try:
        if isinstance(data, str):
            data = data.encode("utf-8", "surrogatepass")
        value = json.loads(data)
        # Surrogates, of pairs too, are raw bytes or escapes; few texts need the second pass.
        raw = b"\xed" in data
        escaped = b"\\u" in data and b"\\ud" in data.lower()
        if raw or escaped:
            text = json.dumps(value, ensure_ascii=False)
            value = json.loads(text.encode("utf-8", "replace"))
        return value
    except UnicodeDecodeError as error:
        raise BadRecord("malformed text", f"{location}: is not UTF-8 ({error.reason}).") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("malformed json", f"{location}: is not JSON ({error}).") from None


def as_list(value: FieldValue) -> list[FieldValue]:
    """A list as it is, another value as its only item."""
    return value if isinstance(value, list) else [value]


def shorten(value: object) -> str:
    """A value for an error message, truncated."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def find_part(ends: Sequence[int], index: int) -> tuple[int, int]:
    """The part with item `index`, and the item's index in it; `ends`: of the parts, in items."""
    part = bisect_right(ends, index)
    start = ends[part - 1] if part else 0
    return part, index - start


class RecordFile(Protocol):
    """The records of one file by index.

    sizes: number of records of each of its shards.
    files: whose contents are compared when a run resumes; empty: there are none.
    """

    @property
    def path(self) -> str | Path: ...

    @property
    def sizes(self) -> Sequence[int]: ...

    @property
    def files(self) -> Sequence[str]: ...

    def locate(self, row: int) -> Record:
        """A record, unread if possible."""
