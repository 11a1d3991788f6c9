"""Checks every record of any supported file before training: `seed data check FILES...`.

Found and named with file and line (or sample, item, row): malformed json, torn files, missing keys, wrong types, codes
out of range, a wrong number of codes, pictures and placeholders that differ in number, empty texts, ids that are there
twice, pictures that are not there or cannot be opened, and records longer than a limit. Everything is counted.

Records go through the readers and decoders of the tool that will take them (`stage`), so it takes what passes here.
Without a tokenizer the codebook is unknown: codes must be whole numbers from 0, and all pictures of one length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from seed_multimodal.data.check.fields import PICTURES, as_tokenised, code_lists, has_pictures, is_raw
from seed_multimodal.data.check.pictures import LLM, STAGES, PictureReader, guess_stage
from seed_multimodal.data.check.report import CheckReport, CheckSettings, Finding
from seed_multimodal.data.decoders.base import TEXT, TEXTS, Decoder
from seed_multimodal.data.decoders.opened import OpenedDecoder, PictureSequence
from seed_multimodal.data.decoders.phrases import BLANK_CAPTION
from seed_multimodal.data.decoders.registry import DECODERS, FEATURE_DECODERS, get_decoder, guess_decoder
from seed_multimodal.data.decoders.sequence import SeededDraws
from seed_multimodal.data.formats.conversations import with_messages
from seed_multimodal.data.formats.open_files import OpenFiles
from seed_multimodal.data.formats.record import BadRecord, Record, RecordFile
from seed_multimodal.data.formats.sources import FileRecords, find_files, open_file, registered
from seed_multimodal.data.formats.tar import TarFile
from seed_multimodal.data.pretokenize.samples import Dropped
from seed_multimodal.data.stream import views
from seed_multimodal.data.stream.mixture import read_sequence
from seed_multimodal.data.stream.skip_budget import BROKEN, SkippedSample
from seed_multimodal.entry import log_line
from seed_multimodal.errors import ConfigError, DataError, ImageError, SeedError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.progress import Progress
from seed_multimodal.settings import nearest


def check_records(settings: CheckSettings, *, progress: bool = True) -> CheckReport:
    """Read every record of the files and count what is there and what is wrong.

    Raises:
        ConfigError: settings that contradict each other. DataError: nothing matches `files`. CheckpointError: no
            tokenizer.
    """
    checker = _Checker(settings)
    files = find_files(settings.files, settings.format, pictures=settings.stage != LLM)
    checker.report.files = len(files)
    with Progress("check", None, "record", delay=1, log=log_line if progress else None) as bar:
        for path, format in files:
            try:
                source = FileRecords([checker.open(path, format)], str(path))
                source.open_files = OpenFiles(rows=0)  # they are read in order
                count = len(source)
            except DataError as error:
                checker.note(getattr(error, "kind", "damaged file"), str(error))
                continue
            checker.sources.append(source)
            every = 1 if settings.pictures is None else -(-count * len(files) // max(settings.pictures, 1))
            for index in range(count):
                checker.read(source, index, opens=index % every == 0 and settings.pictures != 0)
                bar.update()
            source.close()
    return checker.report


class _Checker:
    """Goes through records one by one and fills a report."""

    def __init__(self, settings: CheckSettings) -> None:
        if settings.options and settings.decoder is None:
            raise ConfigError("--option needs --decoder.")
        if settings.format_options and settings.format not in registered():
            raise ConfigError("--format-option needs a registered --format.")
        if settings.length is not None and (settings.tokenizer is None or settings.length < 1):
            raise ConfigError("--length needs --tokenizer, and must be 1 or more.")
        if settings.stage is not None and settings.stage not in STAGES:
            raise ConfigError(f"--stage {settings.stage}: use {', '.join(STAGES)}{nearest(settings.stage, STAGES)}; "
                              f"for LaVIT's and SEED-X's training --decoder ({', '.join(FEATURE_DECODERS)}).")
        if settings.fields and settings.stage in (None, LLM):
            raise ConfigError("--fields needs the --stage that looks at pictures.")
        self._opens = settings.decoder in FEATURE_DECODERS
        if self._opens and (settings.stage not in (None, LLM) or settings.tokenizer is None):
            raise ConfigError(f"--decoder {settings.decoder} needs --tokenizer, the language model's, and the --stage "
                              f"{LLM} or none.")
        self.settings = replace(settings, stage=LLM) if self._opens else settings
        self._pictures = PictureReader(None if settings.images is None else str(settings.images), settings.fields,
                                       settings.stage)
        self.report = CheckReport()
        self.tokenizer: MultimodalTokenizer | None = None
        if settings.tokenizer is not None:
            self.tokenizer = FEATURE_DECODERS.get(settings.decoder or "", Decoder).Words.from_pretrained(
                settings.tokenizer)
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

    def open(self, path: str, format: str) -> RecordFile:
        """A file's records as the stage opens them; a tar of pictures and of unknown use as those of pictures."""
        stage = self.settings.stage
        if format == "tar" and stage != LLM:
            shard = TarFile(path, self._pictures.pair.columns)
            if stage is not None or shard.has(self._pictures.pair.image_keys):
                return shard
        return open_file(path, format, views.TAR_PARTS if self._opens else None, self.settings.format_options)

    def read(self, source: FileRecords, index: int, *, opens: bool = True) -> None:
        """Look at one record; `opens`: open its pictures."""
        self.report.records += 1
        if self._opens:
            self._read_opened(source, index)
            return
        stage = self.settings.stage
        try:
            found = source.locate(index)
            record = found.parsed(source.open_files)
            raw = stage if stage != LLM else None
            if stage is None and (found.members.keys() & {"image", "txt"}
                                  or (is_raw(record.fields) and not self.settings.decoder)):
                raw = guess_stage(record.fields)
            if raw is None or (stage is None and "image" not in found.members):
                record.fields = with_messages(record.fields, record.where)
        except DataError as error:
            self.note(getattr(error, "kind", "damaged file"), str(error))
            return
        if stage is None:
            self._check_id(record, source, index)
        if raw is not None and (stage is not None or "messages" not in record.fields):
            self.report.kinds[f"{raw} (not tokenised)"] += 1
            self.report.control.look(record, "", self.tokenizer)
            self._see(raw, record, source, opens)
            return
        self._read_tokenised(record, source, opens)

    def _read_opened(self, source: FileRecords, index: int) -> None:
        """A record of a decoder that opens pictures, by the reader and decoder of training."""
        decoder, folder = self._decoder(str(self.settings.decoder)), self.settings.images
        assert isinstance(decoder, OpenedDecoder)
        reader = views.PictureReader(decoder, source.open_files, str(folder) if folder else None)
        found = read_sequence(source, index, decoder, reader, SeededDraws(0, self.report.records), self.settings.length)
        self.report.kinds[decoder.name] += 1
        if not isinstance(found, SkippedSample):
            sequence, where = found
            assert isinstance(sequence, PictureSequence)
            self.report.images = self.report.opened = self.report.images + len(sequence.pictures)
            self._note_length(len(sequence) + sequence.cut, where)
        elif found.kind == BROKEN:
            self.note(found.reason, self._with_hint(found.where))
        else:
            self.note("dropped", f"{found.where}: decoder {decoder.name} leaves it out: {found.reason}")

    def _read_tokenised(self, record: Record, source: FileRecords, opens: bool) -> None:
        settings = self.settings
        decoder = DECODERS[settings.decoder] if settings.decoder else guess_decoder(record.fields, self._tokens)
        if decoder is None:
            self.report.kinds["unknown"] += 1
            empty = next((key for key in PICTURES if record.fields.get(key) == ""), None)
            if empty is not None:
                self.note("missing picture", f"{record.where}: its {empty!r} is empty.")
                return
            self.note("missing key", f"{record.where}: its keys ({', '.join(sorted(record.fields)) or 'none'}) are "
                      "those of no known kind of record.")
            return
        self.report.control.look(record, decoder.name, self.tokenizer)
        raw = has_pictures(record.fields) and settings.stage != LLM
        self.report.kinds[decoder.name + (" (not tokenised)" if raw else "")] += 1
        problems = list(self._problems(record.fields, decoder))
        for problem in problems:
            self.note(problem.kind, f"{record.where}: {problem.sentence}")
        if settings.stage == LLM and has_pictures(record.fields):
            self.note("not tokenised", f"{record.where}: has pictures without codes; tokenise the data first.")
            return
        whole = not raw or self._see("chat", record, source, opens)
        if whole and not problems and self.tokenizer is not None:
            self._decode(record, decoder)

    def _see(self, stage: str, record: Record, source: FileRecords, opens: bool) -> bool:
        """Read a record as a stage that looks at pictures, and open them; whether nothing is wrong."""
        before = self.report.wrong
        try:
            pictures = self._pictures.read(stage, record, source.open_files)
            self.report.images += len(pictures)
        except Dropped as reason:
            self.note("dropped", f"{record.where}: is left out ({reason}).")
            return False
        except (DataError, ImageError) as error:
            self.report.images += isinstance(error, ImageError)
            self.note(getattr(error, "kind", "missing picture"), self._with_hint(str(error)))
            return False
        for picture in pictures:
            if picture.problem:
                self.note("missing picture", self._with_hint(picture.problem))
            elif opens:
                self.report.opened += 1
                try:
                    picture.load()
                except ImageError as error:
                    self.note("broken picture", str(error))
        return self.report.wrong == before

    def _with_hint(self, sentence: str) -> str:
        if self.settings.images is not None or " is not there, " not in sentence:
            return sentence
        return f"{sentence.removesuffix('.')} (--images: their folder)."

    # ------------------------------------------------------------------------------------------ parts
    def _problems(self, fields: Mapping[str, Any], decoder: type[Decoder]) -> Iterable[Finding]:
        """What is wrong by the fields that the decoder needs."""
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

    def _check_id(self, record: Record, source: FileRecords, index: int) -> None:
        file = source.files[0]
        mark = record.fields.get("id")
        scope = ""
        if mark is None and record.where.startswith(start := f"{file}: sample "):
            scope = str(file).rpartition("/")[0]  # shards of one folder share no keys
            mark = record.where.removeprefix(start)
        if mark in (None, "") or mark != mark or isinstance(mark, dict | list):  # NaN: an empty field of a table
            return
        short = hashlib.blake2b(f"{scope}\n{mark}".encode("utf-8", "replace"), digest_size=8).digest()
        here = len(self.sources) - 1 << 40 | index
        first = self._ids.setdefault(short, here)
        if first != here:
            other = self.sources[first >> 40]
            before = other.locate(first & (1 << 40) - 1).where
            self.note("duplicate id", f"{record.where}: id {mark} is there already, in {before}.")

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
            fields = record.fields if self.settings.stage == LLM else as_tokenised(record.fields, self._tokens)
            sequence = decoder(fields, SeededDraws(0, self.report.records))
        except SeedError as error:
            self.note(error.kind if isinstance(error, BadRecord) else "codes", f"{record.where}: {error}")
            return
        if sequence is None:
            self.note("dropped", f"{record.where}: decoder {kind.name} leaves it out: {decoder.reason}")
            return
        self._note_length(len(sequence.ids), record.where)

    def _note_length(self, length: int, where: str) -> None:
        self.report.lengths[length] += 1
        if self.settings.length is not None and length > self.settings.length:
            self.note("too long", f"{where}: has {length} tokens, more than {self.settings.length}.")
