"""`seed data check`: decodes N evenly spaced records of each source as training does.

Control words in texts (`</s>`, `<img>`) are counted: as in the original, most decoders turn them
into real tokens, which end a text or open an image.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from seed_multimodal.config import load_yaml
from seed_multimodal.data.decoders import find_decoder
from seed_multimodal.data.decoders.base import Decoder, SeededRandom
from seed_multimodal.data.formats.bad_records import BROKEN, BadRecords
from seed_multimodal.data.formats.record import JsonObject
from seed_multimodal.data.stream.config import LlmDataSettings, read_data_settings
from seed_multimodal.data.stream.source import OpenedSource, open_sources
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.progress import Progress
from seed_multimodal.weights.find import locate_or_same


@dataclass
class SourceReport:
    """Counts of one source."""

    name: str
    size: int
    records: int
    too_long: int = 0  # sequences longer than the run's rows
    lengths: list[int] = field(default_factory=list)  # tokens of each sequence
    skipped: BadRecords = field(default_factory=partial(BadRecords, math.inf))  # by `KIND: REASON`
    # Control words in texts; all image codes count as one.
    control_words: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> JsonObject:
        """All counts, for `--json`; `tokens`: percentiles of the sequence lengths."""
        # 1. Records that were skipped or repaired, and the first few of each reason.
        skipped: list[JsonObject] = []
        first: list[str] = []
        for name, entry in self.skipped.counts.items():
            kind, _, reason = name.partition(": ")
            skipped.append({"kind": kind, "reason": reason, "count": entry["count"]})
            first += [f"{reason}: {message}" for message in entry["first"]]

        # 2. Lengths.
        percentiles = (5, 50, 95, 99, 100)
        shares = np.array(percentiles) / 100
        tokens = np.quantile(self.lengths or [0], shares, method="inverted_cdf").astype(int)
        return {
            "name": self.name,
            "size": self.size,
            "records": self.records,
            "sequences": len(self.lengths),
            "tokens": {f"p{p}": n for p, n in zip(percentiles, tokens.tolist(), strict=True)},
            "too_long": self.too_long,
            "broken": sum(entry["count"] for entry in skipped if entry["kind"] == BROKEN),
            "first": first,
            "skipped": skipped,
            "control_words": dict(self.control_words.most_common()),
        }


def report_lines(report: JsonObject) -> list[str]:
    """The report of a source, by `SourceReport.as_json`, as lines of text."""
    tokens = ", ".join(f"{name[1:]} % {length:,}" for name, length in report["tokens"].items())
    lines = [
        f"{report['name']}: {report['records']:,} of {report['size']:,} records, "
        f"{report['sequences']:,} sequences",
        f"  tokens: {tokens}; too long: {report['too_long']:,}",
    ]
    for entry in report["skipped"]:
        lines.append(f"  {entry['kind']}: {entry['reason']} {entry['count']:,}")
    lines += [f"    {message}" for message in report["first"]]
    if report["control_words"]:
        counts = [f"{word} {count:,}" for word, count in report["control_words"].items()]
        lines.append(
            "  warning: control words in texts, which become real tokens: " + ", ".join(counts)
        )
    return lines


def read_run(path: str | Path, tokenizer: str | None) -> tuple[LlmDataSettings, str]:
    """Data settings and tokenizer folder of a run's YAML (its `data` and `tokenizer`).

    The file may be one of data alone; `tokenizer` replaces the run's.
    """
    config = load_yaml(path)
    source = tokenizer or config.get("tokenizer")
    if isinstance(source, Mapping):
        source = source.get("pretrained_model_name_or_path")
    if not source:
        raise ConfigError(
            f"{path}: names no tokenizer; add --tokenizer DIR (image-only data, which has none, "
            "is checked when training starts)."
        )
    settings = read_data_settings(config.get("data") or config, str(path))
    return settings, str(locate_or_same(source))


def check_sources(settings: LlmDataSettings, tokenizer_dir: str, records: int) -> list[JsonObject]:
    """A report of each source, of which `records` records are decoded as training does.

    Raises as `OpenedSource`.
    """
    # 1. The tokenizer that the decoders need.
    load_tokenizer = Decoder.load_tokenizer
    for source_settings in settings.sources:
        decoder = find_decoder(source_settings.decoder)
        if decoder.load_tokenizer is not Decoder.load_tokenizer:
            load_tokenizer = decoder.load_tokenizer
    tokenizer = load_tokenizer(tokenizer_dir)

    # 2. A few records of many files: by range requests rather than from copies of whole files.
    reports = []
    for source in open_sources(replace(settings, cache=settings.cache or False), tokenizer):
        size = source.size
        count = min(size, records)
        report = SourceReport(source.name, size, count)
        with Progress(source.name, count, "record") as bar:
            for index in range(count):
                _check_record(source, index * size // count, tokenizer, report)
                bar.update()
        reports.append(report.as_json())
    return reports


def _check_record(
    source: OpenedSource, index: int, tokenizer: TextTokenizer, report: SourceReport
) -> None:
    """Decode a record, and add it to the report."""
    record = source.records.locate(index)
    rng = SeededRandom(source.mixture_seed, source.index, index)
    sequence, note = source.decode(record, rng)
    if note is not None:
        report.skipped.add(note._replace(reason=f"{note.kind}: {note.reason}"))
    if sequence is None:
        return
    n_tokens = len(sequence)
    report.lengths.append(n_tokens)
    report.too_long += n_tokens > source.length

    # Some decoders keep control words as plain text, or read them as image codes.
    if source.decoder.has_plain_texts or source.decoder.name == "sft.interleaved":
        return
    for text in _texts(source.records.complete(record).fields):
        _, names = tokenizer.split(text)
        for word in names:
            report.control_words["<img_…>" if word.startswith("<img_") else word] += 1


def _texts(value: object) -> Iterator[str]:
    """All texts of a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
