"""Settings and findings of `seed data check`: counts of records, kinds and errors, lengths, control words in texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seed_multimodal.data.check.words import ControlWords


@dataclass(frozen=True)
class CheckSettings:
    """Settings of the check.

    Args:
        files: as `open_records` and `pairs.Pairs` take them; `format` too. format_options: of a registered format.
        stage: the tool that will take them, of `pictures.STAGES`; only what it cannot use is an error then. None: each
            record is looked at by its keys.
        fields: keys that hold what, for a stage that looks at pictures.
        pictures: about so many pictures are opened, evenly over the files; None: all. A decoder that opens pictures
            (`FEATURE_DECODERS`) opens all.
        tokenizer: folder of the tokenizer the training will use. `length`: tokens a record may have (needs it).
        decoder: of all records; None: guessed from each record's keys. `options` go to it.
        images: folder of pictures; None: paths count from their file's folder, or from the current one.
        max_errors: this many findings are kept as sentences (all are counted); 0 keeps every one.
    """

    files: Sequence[str | Path]
    format: str = "auto"
    format_options: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | Path | None = None
    decoder: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    images: str | Path | None = None
    max_errors: int = 20
    length: int | None = None
    stage: str | None = None
    fields: str | Mapping[str, str] = field(default_factory=dict)
    pictures: int | None = 200


@dataclass(frozen=True)
class Finding:
    """One error: its kind, and a sentence with file and place."""

    kind: str
    sentence: str


@dataclass
class CheckReport:
    """Counts and findings.

    Attributes:
        images: pictures, of which `opened` were opened (tokenised ones need not be).
        kinds: records by decoder, or by the stage for pictures.
        lengths: records by their number of tokens (with a tokenizer).
        control: names of control words in texts, which are reported but not wrong.
    """

    files: int = 0
    records: int = 0
    images: int = 0
    opened: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    lengths: Counter[int] = field(default_factory=Counter)
    control: ControlWords = field(default_factory=ControlWords)

    @property
    def wrong(self) -> int:
        """All findings, also those whose sentence was not kept."""
        return self.errors.total()

    def length_at(self, share: float) -> int:
        """The length that `share` (0..1) of the records do not exceed."""
        wanted, seen = share * self.lengths.total(), 0
        for length, count in sorted(self.lengths.items()):
            seen += count
            if seen >= wanted:
                return length
        return 0

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, to, records) by powers of two."""
        bins: Counter[int] = Counter()
        for length, count in self.lengths.items():
            bins[max(5, (length - 1).bit_length())] += count
        return [(0 if n == 5 else 2 ** (n - 1) + 1, 2 ** n, bins[n])
                for n in range(min(bins, default=0), max(bins, default=-1) + 1)]

    def as_json(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        lengths = {"median": self.length_at(0.5), "p95": self.length_at(0.95), "longest": max(self.lengths, default=0),
                   "tokens": sum(n * count for n, count in self.lengths.items()),
                   "histogram": [{"from": low, "to": high, "records": n} for low, high, n in self.histogram()]}
        return {"files": self.files, "records": self.records, "images": self.images, "opened": self.opened,
                "kinds": dict(self.kinds),
                "errors": dict(self.errors), "wrong": self.wrong,
                "findings": [asdict(one) for one in self.findings],
                "control_words": self.control.as_json(), "lengths": lengths if self.lengths else None}
