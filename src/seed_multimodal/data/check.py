"""`seed data check`: decodes N evenly spaced records of each source as training does.

Control words in texts (`</s>`, `<img>`) are counted: as in the original, most decoders turn them into real tokens,
which end a text or open an image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from seed_multimodal.config import load_yaml
from seed_multimodal.data.decoders import DECODERS, FEATURE_DECODERS
from seed_multimodal.data.decoders.base import SeededRandom
from seed_multimodal.data.formats.layout import GROUP_CACHE_BYTES
from seed_multimodal.data.stream.config import LlmDataSettings, read_data_settings
from seed_multimodal.data.stream.mixture import BROKEN, Mixture, SkippedRecord
from seed_multimodal.entry import log_line
from seed_multimodal.errors import ConfigError
from seed_multimodal.hub import locate
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.progress import Progress

SHOWN = 3  # records listed for each kind of problem
LETTERS = (
    "chat",
    "sft.interleaved",
)  # decoders that keep control words as plain text, or read them as image codes


@dataclass
class SourceReport:
    """Counts of one source."""

    name: str
    size: int
    records: int
    too_long: int = 0  # sequences longer than the run's rows
    lengths: list[int] = field(default_factory=list)  # tokens of each sequence
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and reason
    first: list[str] = field(default_factory=list)  # messages of the first ones
    largest_group: int = 0  # bytes of the largest row group of a table
    control: Counter[str] = field(
        default_factory=Counter
    )  # names of control words in texts (all image codes as one)

    @property
    def broken(self) -> int:
        """How many records cannot be read or decoded."""
        return sum(count for (kind, _), count in self.skipped.items() if kind == BROKEN)

    @property
    def tokens(self) -> dict[str, int]:
        """Percentiles 5, 50, 95, 99 and 100 of the sequence lengths."""
        return {
            f"p{share}": int(np.quantile(self.lengths or [0], share / 100, method="inverted_cdf"))
            for share in (5, 50, 95, 99, 100)
        }

    def as_json(self) -> dict[str, Any]:
        """All counts, for `--json`."""
        return {
            "name": self.name,
            "size": self.size,
            "records": self.records,
            "sequences": len(self.lengths),
            "tokens": self.tokens,
            "too_long": self.too_long,
            "broken": self.broken,
            "first": self.first,
            "skipped": [
                {"kind": kind, "reason": reason, "count": count}
                for (kind, reason), count in self.skipped.items()
            ],
            "control_words": dict(self.control),
            "largest_group_bytes": self.largest_group,
        }

    def lines(self) -> list[str]:
        """The report as lines of text."""
        tokens = ", ".join(f"{name[1:]} % {length:,}" for name, length in self.tokens.items())
        found = [
            f"{self.name}: {self.records:,} of {self.size:,} records, {len(self.lengths):,} sequences",
            f"  tokens: {tokens}; too long: {self.too_long:,}",
        ]
        found += [
            f"  {kind}: {reason} {count:,}" for (kind, reason), count in self.skipped.most_common()
        ]
        found += [f"    {message}" for message in self.first]
        if self.largest_group > GROUP_CACHE_BYTES:
            found.append(
                f"  warning: row groups of up to {self.largest_group >> 20:,} MiB are larger than the "
                f"cache of a data worker ({GROUP_CACHE_BYTES >> 20} MiB): they take more memory, and "
                "samples are shuffled only within one of them; write the table again with "
                "row_group_size=100"
            )
        words = ", ".join(f"{word} {count:,}" for word, count in self.control.most_common())
        return (
            [*found, f"  warning: control words in texts, which become real tokens: {words}"]
            if words
            else found
        )


def read_run(path: str | Path, tokenizer: str | None) -> tuple[LlmDataSettings, str]:
    """Data settings and tokenizer of a run's YAML (its `data` and `tokenizer`), or of a data file alone."""
    config = load_yaml(path)
    words = tokenizer or config.get("tokenizer")
    words = words.get("pretrained_model_name_or_path") if isinstance(words, Mapping) else words
    if not words:
        raise ConfigError(
            f"{path}: names no tokenizer; add --tokenizer DIR (image-only data, which has none, "
            "is checked when training starts)."
        )
    return read_data_settings(config.get("data") or config, str(path)), str(
        locate(str(words)) or words
    )


def check_sources(
    settings: LlmDataSettings, tokenizer: str, records: int = 1000
) -> list[SourceReport]:
    """Decode `records` records of each source as training does. Raises as `Mixture`."""
    decoders = [(DECODERS | FEATURE_DECODERS).get(source.decoder) for source in settings.sources]
    kinds = {decoder.Tokenizer for decoder in decoders if decoder is not None} - {
        MultimodalTokenizer
    }
    words = (kinds or {MultimodalTokenizer}).pop().from_pretrained(tokenizer)
    # A few records of many files: by range requests rather than from copies of whole files.
    mixture = Mixture(replace(settings, cache=settings.cache or False), words)
    reports = []
    for number, source in enumerate(settings.sources):
        size = len(mixture.records[number])
        count = min(size, records)
        largest_group = int(mixture.records[number].layout.group_bytes.max())
        report = SourceReport(source.name, size, count, largest_group=largest_group)
        with Progress(source.name, count, "record", delay=1, log=log_line) as bar:
            for place in range(count):
                _check_record(mixture, number, place * size // count, words, report)
                bar.update()
        reports.append(report)
    return reports


def _check_record(
    mixture: Mixture, source: int, index: int, words: MultimodalTokenizer, report: SourceReport
) -> None:
    found = mixture.decode(source, index, SeededRandom(mixture.settings.seed, source, index))
    if isinstance(found, SkippedRecord):
        key = found.kind, found.reason
        report.skipped[key] += 1
        if report.skipped[key] <= SHOWN:
            report.first.append(f"{found.reason}: {found.location}")
        return
    report.lengths.append(len(found[0]))
    report.too_long += len(found[0]) > mixture.settings.chunk_shape(source)[1]
    if mixture.decoders[source].name not in LETTERS:
        for text in _texts(mixture.records[source].read(index).fields):
            report.control.update(
                "<img_…>" if word.startswith("<img_") else word for word in words.split(text)[1::2]
            )


def _texts(value: Any) -> Iterator[str]:
    """All texts of a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | Mapping):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)
