"""The record type of all data: readers return it; decoders, pairs and pre-tokenization accept it.

An unread record has only the offsets of its members, so that it can be sent to a worker process.
"""

from __future__ import annotations

import json
import os
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from seed_multimodal.disk import JsonObject as JsonObject
from seed_multimodal.disk import is_file, read_patiently
from seed_multimodal.errors import CodesError, DataError, ImageError, first_line

FieldValue = Any  # of JSON or YAML, bytes of tables, or a function that renders an image
RecordFields = Mapping[str, FieldValue]


# What unexpected values raise in the code that uses them: another type, an empty list, NaN.
VALUE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
# Errors of an unusable record: it is named, skipped and counted; only many in a row end a run.
# ReadError, a fault of the machine, is none of them.
RECORD_FAULTS = (CodesError, DataError, ImageError, *VALUE_ERRORS)
LISTED_RECORDS = 5  # for each reason
BROKEN = "broken"  # this and the next three: kinds of `RecordNote`
DROPPED = "dropped"
REPAIRED = "repaired"
TOO_LONG = "too long"


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


class BadRecords:
    """Counts unusable records by reason, with the first few of each.

    limit: consecutive ones that end the run; of replaced ones see `count_replaced`.
    log: receives a line, which begins with `label`, for each record that is listed.

    counts: reason → {"count", "first": messages}, for JSON; it does not grow with their number.
    """

    def __init__(
        self,
        limit: int = 20,
        log: Callable[[str], None] | None = None,
        label: str = "",
        counts: JsonObject | None = None,
    ) -> None:
        self.limit = limit
        self.log = log
        self.label = label
        self.counts: JsonObject = {} if counts is None else counts
        self.in_a_row = 0
        self.n_replaced = 0
        self.n_used = 0  # of the batches in which they were replaced

    @property
    def total(self) -> int:
        """Number of counted records."""
        return sum(entry["count"] for entry in self.counts.values())

    def usable(self) -> None:
        """A usable record ends a row of bad ones."""
        self.in_a_row = 0

    def add(self, note: RecordNote) -> None:
        """Count a record that was left out or changed.

        Raises DataError: as many broken ones in a row as the limit.
        """
        self.count(note)
        if note.kind != BROKEN:
            return
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise DataError(
                f"{self.label}{self.in_a_row} records in a row cannot be used; the last: "
                f"{note.location}"
            )

    def count(self, note: RecordNote) -> None:
        """As `add`, without a limit."""
        self.merge({note.reason: {"count": 1, "first": [note.location]}}, self.log)

    def count_replaced(self, notes: Sequence[RecordNote], n_used: int) -> None:
        """Count the samples of a training batch of `n_used` that others were taken for.

        Raises DataError: more were replaced than used, and more than the limit. A process compares
        what it counted itself since its start, not what was merged.
        """
        for note in notes:
            self.count(note)
        self.n_replaced += len(notes)
        self.n_used += n_used
        # Such a run would learn a few samples, again and again.
        if self.n_replaced > max(self.n_used, self.limit):
            raise DataError(
                f"{self.n_replaced} samples could not be used and only {self.n_used} could, so "
                "batches repeat a few; repair or remove those that are named above."
            )

    def merge(self, counts: RecordFields, log: Callable[[str], None] | None = None) -> None:
        """Add the counts of another process or run; records listed anew are logged."""
        for reason, added in counts.items():
            entry = self.counts.setdefault(reason, {"count": 0, "first": []})
            entry["count"] += added["count"]
            for message in added["first"]:
                if len(entry["first"]) == LISTED_RECORDS or message in entry["first"]:
                    continue
                entry["first"].append(message)
                if log is not None:
                    log(f"{self.label}{reason}: {message}")


class RecordNote(NamedTuple):
    """Why a record was left out, or how it was changed."""

    kind: str  # BROKEN, DROPPED, REPAIRED or TOO_LONG
    reason: str
    location: str  # file and line or sample, or the error message of a broken record


def broken_note(error: Exception, location: str) -> RecordNote:
    """A broken record, by one of `RECORD_FAULTS`."""
    if isinstance(error, VALUE_ERRORS):
        reason = f"{type(error).__name__}: {first_line(error)}"
        message = f"{location}: has a value that cannot be used ({reason})."
        return RecordNote(BROKEN, "unusable value", message)
    default = "unreadable image" if isinstance(error, ImageError) else "broken record"
    message = str(error) if location in str(error) else f"{location}: {error}"
    return RecordNote(BROKEN, getattr(error, "kind", default), message)


def unusable_value(error: Exception, location: str) -> BadRecord:
    """The error of a record, or of a file, for one of `VALUE_ERRORS`."""
    _, kind, message = broken_note(error, location)
    return BadRecord(kind, message)


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


def find_image(
    path: str, root: str | Path | None = None, list_file: str | Path | None = None
) -> Path | None:
    """The file of an image, or None.

    root: folder of the images; by default the folder of `list_file`, then the current one.

    As in SEED-X's lists, a leading slash may mean that folder.
    """
    if root is not None:
        folders = [Path(root).expanduser()]
    else:
        folders = [Path(list_file).parent if list_file else Path(), Path()]
    path = os.path.expanduser(path)
    # Lists of Windows have backslashes.
    for name in dict.fromkeys((path, path.replace("\\", "/"))):
        candidates = [folder / name.lstrip("/") for folder in folders]
        if Path(name).is_absolute():
            candidates.insert(0, Path(name))
        for candidate in candidates:
            if is_file(candidate):
                return candidate
    # Windows and macOS ignore case. An image as base64 text has no full stop.
    if "." not in path:
        return None
    matches = filter(None, map(_ignoring_case, candidates))
    return next(filter(is_file, matches), None)


def _ignoring_case(path: Path) -> Path | None:
    """The path whose names differ at most in case."""
    found = Path(path.anchor)
    for name in path.relative_to(path.anchor).parts:
        if not os.path.exists(found / name):
            name = _names(found).get(_comparable(name), "")
            if not name:
                return None
        found /= name
    return found


@lru_cache(64)
def _names(folder: Path) -> dict[str, str]:
    """The names in a folder by their `_comparable` form."""
    try:
        names = read_patiently(folder, lambda: os.listdir(folder))
        return {_comparable(name): name for name in names}
    except OSError:
        return {}


def _comparable(name: str) -> str:
    """A name in lower case; macOS writes accents as characters of their own."""
    return unicodedata.normalize("NFC", name.lower())


def find_part(ends: Sequence[int], index: int) -> tuple[int, int]:
    """The part with item `index`, and the item's index in it; `ends`: of the parts, in items."""
    part = bisect_right(ends, index)
    start = ends[part - 1] if part else 0
    return part, index - start


class RecordFile(Protocol):
    """The records of one file by index; `sizes`: number of records of each of its shards."""

    @property
    def path(self) -> str | Path: ...

    @property
    def sizes(self) -> Sequence[int]: ...

    def locate(self, row: int) -> Record:
        """A record, unread if possible."""
