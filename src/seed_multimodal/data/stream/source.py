"""The sources of an LLM's training data: sequences by source and position.

Positions run through a source's epochs endlessly; randomness in decoding is determined by (seed,
source, position).
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from seed_multimodal.data.decoders import get_decoder
from seed_multimodal.data.decoders.base import SeededRandom, TrainingSequence
from seed_multimodal.data.decoders.features import FeatureDecoder, ImageSequence
from seed_multimodal.data.formats.bad_records import (
    BROKEN,
    DROPPED,
    RECORD_FAULTS,
    REPAIRED,
    TOO_LONG,
    RecordNote,
    broken_note,
)
from seed_multimodal.data.formats.record import Record
from seed_multimodal.data.formats.records import open_records
from seed_multimodal.data.formats.storage import is_remote
from seed_multimodal.data.stream.config import LlmDataSettings
from seed_multimodal.data.stream.order import EpochOrder, even_block
from seed_multimodal.data.stream.packing import Piece, split_long
from seed_multimodal.data.stream.stream import ReadResult
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import DataError, pluralize
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.settings import IDENTITY

USABLE_WITHIN = 100  # records tried before a source is rejected
_TOO_LONG_REASONS = {
    "skip": "too long, skipped",
    "truncate": "too long, cut",
    "split": "too long, split",
}


class OpenedSource:
    """One source of a mixture: files, decoder and sample order."""

    def __init__(self, settings: LlmDataSettings, index: int, tokenizer: TextTokenizer) -> None:
        """Raises ConfigError: unknown decoder or option; DataError: missing or unreadable files."""
        source = settings.sources[index]
        self.index = index
        self.settings = source
        self.name = source.name
        self.mixture_seed = settings.seed
        self.seed = zlib.crc32(f"{settings.seed} {source.name}".encode())

        # 1. Files and their decoder.
        self.records = open_records(
            source.files,
            format=source.format,
            name=source.name,
            cache=settings.cache,
            options=source.format_options,
        )
        self.decoder = get_decoder(source.decoder, tokenizer, source.options)
        self.has_pixels = isinstance(self.decoder, FeatureDecoder)

        # 2. Chunks, and what happens to a sequence that is too long for them.
        self.rows, self.length = settings.chunk_shape(index)
        self.packing = settings.packing
        self.too_long = settings.too_long if settings.packing else "truncate"
        if self.too_long == "split" and not self.decoder.can_split:
            self.too_long = "skip"

        # 3. The records of an epoch, and their order; those of a single shard are shuffled among
        #    each other. The files are indexed here, before workers are forked.
        self.size = len(self.records)
        shard_sizes = self.records.shard_sizes
        if len(shard_sizes) == 1:
            self.shards = EpochOrder(self.size, self.seed)
        else:
            block = even_block(self.size)
            self.shards = EpochOrder(self.size, self.seed, shard_sizes=shard_sizes, block=block)

    def decode(
        self, record: Record, rng: SeededRandom, max_length: int | None = None
    ) -> tuple[TrainingSequence | None, RecordNote | None]:
        """The sequence of an unread record, truncated as by the original decoder.

        None: it is left out. The note says why, or how it was repaired.
        """
        try:
            record = self.records.complete(record)
            fields = record.fields
            if isinstance(self.decoder, FeatureDecoder):
                fields = self.decoder.read_fields(record, self.settings.image_dir)
            sequence = self.decoder.decode(fields, rng, max_length)
        except RECORD_FAULTS as error:
            return None, broken_note(error, record.location)
        if sequence.drop_reason or not sequence.ids:
            return None, RecordNote(DROPPED, sequence.drop_reason or "empty", record.location)
        if sequence.repaired:
            return sequence, RecordNote(REPAIRED, sequence.repaired, record.location)
        return sequence, None

    def read(self, position: int) -> ReadResult[Piece]:
        """The sequence at a position of the endless order, as pieces that fit into rows."""
        # 1. Read and decode the record.
        ((_, index),) = self.shards.samples(position, 1)
        record = self.records.locate(index)
        rng = SeededRandom(self.mixture_seed, self.seed, position)
        max_length = None if self.too_long == "split" else self.length
        sequence, note = self.decode(record, rng, max_length)
        if sequence is None:
            return ReadResult([], note)
        n_tokens = len(sequence) + sequence.n_truncated
        if n_tokens > self.length:
            detail = f"{record.location} ({n_tokens} tokens, rows have {self.length})"
            note = RecordNote(TOO_LONG, _TOO_LONG_REASONS[self.too_long], detail)
            if self.too_long == "skip":
                return ReadResult([], note)

        # 2. Split it, and cut its images into views.
        try:
            pieces = self._pieces(position, sequence)
        except RECORD_FAULTS as error:
            return ReadResult([], broken_note(error, record.location))
        if not pieces:
            note = RecordNote(DROPPED, "nothing to learn in it", record.location)
        return ReadResult(pieces, note)

    def checksum(self) -> int:
        """Of the files."""
        return self.records.checksum

    def _pieces(self, position: int, sequence: TrainingSequence) -> list[Piece]:
        """The sequence's pieces with something to learn.

        One with images as pixels, or with positions of its own, is never split.
        """
        ids = np.array(sequence.ids, np.int32)
        labels = np.array(sequence.labels, np.int32)
        if isinstance(self.decoder, FeatureDecoder) and isinstance(sequence, ImageSequence):
            views = self.decoder.cut(sequence)
            return [Piece(self.index, position, 0, ids, labels, views, sequence.position_ids)]
        if sequence.position_ids is not None:
            return [Piece(self.index, position, 0, ids, labels, None, sequence.position_ids)]
        arrays = split_long(ids, labels, self.length, self.decoder.vocabulary)
        if self.packing:
            arrays = [(ids, labels) for ids, labels in arrays if (labels[1:] != IGNORE_INDEX).any()]
        return [
            Piece(self.index, position, index, ids, labels)
            for index, (ids, labels) in enumerate(arrays)
        ]

    def check_usable(self, max_bad_in_a_row: int) -> None:
        """Raise DataError if none of the first records is usable."""
        count = min(self.size, max(USABLE_WITHIN, max_bad_in_a_row))
        if any(self.read(position).samples for position in range(count)):
            return
        first = self.read(0).note
        assert first is not None
        reason = "" if first.kind == BROKEN else f": {first.reason}."
        raise DataError(
            f"Source {self.name}: no usable record ({pluralize(count, 'record')} tried); "
            f"the first: {first.location}{reason}"
        )


def open_sources(settings: LlmDataSettings, tokenizer: TextTokenizer) -> list[OpenedSource]:
    """The sources of an LLM's data, whose files are indexed.

    Raises as `OpenedSource`; ConfigError: a source that can never be drawn; DataError: codes of
    several tokenizers.
    """
    settings.check_reachable()
    sources = [OpenedSource(settings, index, tokenizer) for index in range(len(settings.sources))]
    check_codes(sources)
    return sources


def check_codes(sources: Sequence[OpenedSource]) -> None:
    """Raise DataError if sources have codes of several tokenizers, by the `IDENTITY` that
    pre-tokenizing writes into the folder of its shards; those of URLs are not compared."""
    paths = [str(file.path) for source in sources for file in source.records.record_files]
    files: dict[str, Path] = {}  # fingerprint of the tokenizer → the first file that names it
    for folder in sorted({Path(path).parent for path in paths if not is_remote(path)}):
        fingerprint, file = _tokenizer_of(folder)
        if fingerprint:
            files.setdefault(fingerprint, file)
    if len(files) > 1:
        named = " and ".join(map(str, files.values()))
        raise DataError(
            f"{named} name different tokenizers, whose codes mean different things; pre-tokenize "
            "all images with one of them. If they have one codebook (other precision, other draws "
            "of LaVIT's), write one 'tokenizer' into both files."
        )


def _tokenizer_of(folder: Path) -> tuple[str, Path]:
    """The tokenizer's fingerprint of the nearest `IDENTITY` of pre-tokenizing in or above a folder,
    and its file; "": there is none."""
    for parent in (folder, *folder.parents):
        file = parent / IDENTITY
        # Other programs have files of this name.
        with contextlib.suppress(DataError):
            settings = read_json_object(file, DataError)
            if settings.keys() >= {"kind", "tokenizer", "transform"}:
                return str(settings["tokenizer"]), file
    return "", folder
