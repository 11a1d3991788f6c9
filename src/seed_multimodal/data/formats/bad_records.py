"""Which errors are a record's, and how unusable records are counted: the same for all readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from seed_multimodal.data.formats.record import BadRecord, JsonObject, RecordFields
from seed_multimodal.errors import CodesError, DataError, ImageError, first_line

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
class BadRecords:
    """Counts unusable records by reason, with the first few of each.

    limit: consecutive ones that end the run.
    log: receives a line, which begins with `label`, for each record that is listed.

    counts: reason → {"count", "first": messages}, for JSON; it does not grow with their number.
    in_a_row: broken ones since the last usable record, at which its reader sets it to 0.
    """

    limit: float = 20
    log: Callable[[str], None] | None = None
    label: str = ""
    counts: JsonObject = field(default_factory=dict)
    in_a_row: int = 0

    @property
    def total(self) -> int:
        """Number of counted records."""
        return sum(entry["count"] for entry in self.counts.values())

    def add(self, note: RecordNote) -> None:
        """Count a record that was left out or changed.

        Raises DataError: as many broken ones in a row as the limit.
        """
        self.merge({note.reason: {"count": 1, "first": [note.location]}}, self.log)
        if note.kind != BROKEN:
            return
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise DataError(
                f"{self.label}{self.in_a_row} records in a row cannot be used; the last: "
                f"{note.location}"
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
