"""Checks every record of any supported file before training: `seed data check FILES...`.

Found and named with file and line (or sample, item, row): malformed json, torn files, missing keys, wrong types, codes
out of range, a wrong number of codes, pictures and placeholders that differ in number, empty texts, ids that are there
twice, picture files that are not there, and records longer than a limit. Everything is counted.

Without a tokenizer the codebook is unknown: codes must be whole numbers from 0, and all pictures of one length. With
one, each record also goes through its decoder, so training accepts what passes here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seed_multimodal.data.check.fields import RAW_TEXTS, as_tokenised, code_lists, image_paths, is_raw
from seed_multimodal.data.check.report import CheckReport, Finding
from seed_multimodal.data.decoders.base import TEXT, TEXTS, Decoder
from seed_multimodal.data.decoders.phrases import BLANK_CAPTION
from seed_multimodal.data.decoders.registry import DECODERS, get_decoder, guess_decoder
from seed_multimodal.data.decoders.sequence import SeededDraws
from seed_multimodal.data.formats.files import find_files
from seed_multimodal.data.formats.record import BadRecord, Record, find_image
from seed_multimodal.data.formats.records import FileRecords, open_file
from seed_multimodal.entry import log_line
from seed_multimodal.errors import ConfigError, DataError, SeedError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.progress import Progress


@dataclass(frozen=True)
class CheckSettings:
    """Settings of the check.

    Args:
        files: as `open_records` takes them; `format` too.
        tokenizer: folder of the tokenizer the training will use. `length`: tokens a record may have (needs it).
        decoder: of all records; None: guessed from each record's keys. `options` go to it.
        images: folder of pictures; None: paths count from their file's folder, or from the current one.
        max_errors: this many findings are kept as sentences (all are counted); 0 keeps every one.
    """

    files: Sequence[str | Path]
    format: str = "auto"
    tokenizer: str | Path | None = None
    decoder: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    images: str | Path | None = None
    max_errors: int = 20
    length: int | None = None


def check_records(settings: CheckSettings, *, progress: bool = True) -> CheckReport:
    """Read every record of the files and count what is there and what is wrong.

    Raises:
        ConfigError: settings that contradict each other. DataError: nothing matches `files`. CheckpointError: no
            tokenizer.
    """
    checker = _Checker(settings)
    files = find_files(settings.files, settings.format)
    checker.report.files = len(files)
    with Progress("check", None, "record", delay=1, log=log_line if progress else None) as bar:
        for path, format in files:
            source = FileRecords([open_file(path, format)], str(path))
            try:
                count = len(source)
            except DataError as error:
                checker.note(getattr(error, "kind", "damaged file"), str(error))
                continue
            checker.sources.append(source)
            for index in range(count):
                checker.read(source, index)
                bar.update()
            source.close()
    return checker.report


class _Checker:
    """Goes through records one by one and fills a report."""

    def __init__(self, settings: CheckSettings) -> None:
        if settings.options and settings.decoder is None:
            raise ConfigError("--option needs --decoder.")
        if settings.length is not None and (settings.tokenizer is None or settings.length < 1):
            raise ConfigError("--length needs --tokenizer, and must be 1 or more.")
        self.settings = settings
        self.report = CheckReport()
        self.tokenizer: MultimodalTokenizer | None = None
        if settings.tokenizer is not None:
            self.tokenizer = MultimodalTokenizer.from_pretrained(settings.tokenizer)
        self._decoders: dict[str, Decoder] = {}
        if settings.decoder is not None and settings.decoder not in DECODERS or self.tokenizer is not None:
            self._decoder(settings.decoder or "chat")  # refuses an unknown name or option before anything is read
        self._tokens = self.tokenizer.vocabulary.tokens_per_image if self.tokenizer is not None else 0  # not known yet
        self._codes = self.tokenizer.vocabulary.n_codes if self.tokenizer is not None else None
        self.sources: list[FileRecords] = []
        self._ids: dict[bytes, int] = {}  # of each id: where it was, as (source, record) in one number

    def note(self, kind: str, sentence: str) -> None:
        """Count a finding, and keep its sentence if there is room."""
        self.report.errors[kind] += 1
        if self._has_room():
            self.report.findings.append(Finding(kind, sentence))

    def _has_room(self) -> bool:
        return not self.settings.max_errors or len(self.report.findings) < self.settings.max_errors

    def read(self, source: FileRecords, index: int) -> None:
        """Look at one record."""
        self.report.records += 1
        try:
            record = source.read(index)
        except DataError as error:
            self.note(getattr(error, "kind", "damaged file"), str(error))
            return
        self._check_id(record, source, index)
        raw = is_raw(record.fields) and self.settings.decoder is None
        decoder = None if raw else (DECODERS[self.settings.decoder] if self.settings.decoder else
                                    guess_decoder(record.fields, self._tokens))
        if decoder is None and not raw:
            self.report.kinds["unknown"] += 1
            self.note("missing key", f"{record.where}: its keys ({', '.join(sorted(record.fields)) or 'none'}) are "
                      "those of no known kind of record.")
            return
        self.report.control.look(record, decoder.name if decoder else "", self.tokenizer)
        paths = image_paths(record.fields)
        self.report.kinds[decoder.name + (" (not tokenised)" if paths else "") if decoder else "not tokenised"] += 1
        problems = [*self._problems(record.fields, decoder), *self._lost(source.files[0], paths)]
        for problem in problems:
            self.note(problem.kind, f"{record.where}: {problem.sentence}")
        if not problems and self.tokenizer is not None and decoder is not None:
            self._decode(record, decoder)

    # ------------------------------------------------------------------------------------------ parts

    def _problems(self, fields: Mapping[str, Any], decoder: type[Decoder] | None) -> Iterable[Finding]:
        """What is wrong by the fields that the decoder needs; None: with pictures that are not tokenised yet."""
        needs: Mapping[str, str] = dict.fromkeys(RAW_TEXTS, TEXT)
        if decoder is not None:
            needs = decoder.needed(fields)
            for key in decoder.missing(fields):
                yield Finding("missing key", f"has no key {key!r}, which decoder {decoder.name} needs.")
            if "image_ids" in needs and "views" in fields and not fields["views"] and fields.get("image_ids") is None:
                yield Finding("missing key", "'views' is empty, and there are no 'image_ids'.")
        for key, kind in needs.items():
            if kind not in (TEXT, TEXTS) or fields.get(key) is None:
                continue
            several = kind == TEXTS and isinstance(fields[key], list) and fields[key]
            texts = fields[key] if several else [fields[key]]
            if not all(isinstance(text, str) for text in texts):
                yield Finding("wrong type", f"{key!r} is a {type(fields[key]).__name__}, not a text.")
            elif not all(text.strip(BLANK_CAPTION if key == "text" else None) for text in texts):
                yield Finding("empty text", f"{key!r} is empty.")
        if decoder is None and not any(key in fields for key in RAW_TEXTS):
            yield Finding("missing key", "has a picture but no text.")
        for name, codes, pictures in code_lists(fields, decoder):
            yield from self._wrong_codes(name, codes, pictures)

    def _wrong_codes(self, name: str, codes: Any, pictures: int) -> Iterable[Finding]:
        if not isinstance(codes, list | tuple) or any(type(code) is not int for code in codes):
            yield Finding("wrong type", f"{name}: is no list of whole numbers.")
            return
        if not self._tokens and pictures == 1 and codes:
            self._tokens = len(codes)  # the first picture sets the length of all
        size = self._tokens or len(codes) or 1
        self.report.images += pictures or len(codes) // size
        wrong = next((code for code in codes if code < 0 or (self._codes is not None and code >= self._codes)), None)
        if wrong is not None:
            limit = "at least 0" if self._codes is None else f"0 to {self._codes - 1}"
            yield Finding("codes out of range", f"{name}: code {wrong} is out of range ({limit}).")
        if not codes or (len(codes) != pictures * size if pictures else len(codes) % size):
            hint = "" if self.tokenizer is not None else " (as the first one that was read)"
            yield Finding("number of codes", f"{name}: has {len(codes)} codes; a picture has {size}{hint}"
                          + (f", and this holds {pictures}." if pictures > 1 else "."))

    def _lost(self, file: Path, paths: Sequence[str]) -> Iterable[Finding]:
        self.report.images += len(paths)
        for path in paths:
            if "://" in path or path.startswith("data:"):
                yield Finding("missing picture", f"{path[:80]}: is an address, not a file; download it first.")
            elif find_image(path, self.settings.images, file) is None:
                where = f"below {self.settings.images}" if self.settings.images else \
                    "beside its list or in the current folder (--images: their folder)"
                shown = path if len(path) <= 200 else f"{path[:80]}…"  # some lists hold the picture itself, as base64
                yield Finding("missing picture", f"the picture {shown} is not there, {where}.")

    def _check_id(self, record: Record, source: FileRecords, index: int) -> None:
        file = source.files[0]
        mark = record.fields.get("id")
        scope = ""
        if mark is None and record.where.startswith(start := f"{file}: sample "):
            mark, scope = record.where.removeprefix(start), str(file.parent)  # shards of one folder share no keys
        if mark in (None, "") or mark != mark or isinstance(mark, dict | list):  # NaN: an empty field of a table
            return
        short = hashlib.blake2b(f"{scope}\n{mark}".encode("utf-8", "replace"), digest_size=8).digest()
        here = len(self.sources) - 1 << 40 | index
        first = self._ids.setdefault(short, here)
        if first != here:
            other = self.sources[first >> 40]
            # Read again only for a sentence that is kept: it may take a whole row group.
            before = other.read(first & (1 << 40) - 1).where if self._has_room() else ""
            self.note("duplicate id", f"{record.where}: id {mark} is there already, in {before}.")
            if other is not source:
                other.close()

    def _decoder(self, name: str, **guessed: Any) -> Decoder:
        options = guessed if self.settings.decoder is None else self.settings.options
        key = f"{name} {guessed}"
        if key not in self._decoders:
            # Without a tokenizer this only refuses an unknown name.
            self._decoders[key] = get_decoder(name, self.tokenizer, options)  # type: ignore[arg-type]
        return self._decoders[key]

    def _decode(self, record: Record, kind: type[Decoder]) -> None:
        decoder = self._decoder(kind.name, **({} if self.settings.decoder else
                                              kind.guess_options(record.fields, self._tokens)))
        try:
            sequence = decoder(as_tokenised(record.fields, self._tokens), SeededDraws(0, self.report.records))
        except SeedError as error:
            self.note(error.kind if isinstance(error, BadRecord) else "codes", f"{record.where}: {error}")
            return
        if sequence is None:
            self.note("dropped", f"{record.where}: decoder {kind.name} leaves it out: {decoder.reason}")
            return
        self.report.lengths[len(sequence.ids)] += 1
        if self.settings.length is not None and len(sequence.ids) > self.settings.length:
            self.note("too long", f"{record.where}: has {len(sequence.ids)} tokens, more than {self.settings.length}.")
