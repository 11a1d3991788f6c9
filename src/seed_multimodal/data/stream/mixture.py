"""Mixture of an LLM's training sources: sequences by source and position.

Positions run through a source's epochs endlessly; randomness in decoding is determined by (seed,
source, position).
"""

from __future__ import annotations

import zlib
from functools import cached_property
from typing import NamedTuple

import numpy as np

from seed_multimodal.data.decoders import get_decoder, opens_images
from seed_multimodal.data.decoders.base import SeededRandom, TrainingSequence
from seed_multimodal.data.decoders.features import FeatureDecoder, ImageSequence
from seed_multimodal.data.formats.record import (
    BROKEN,
    DROPPED,
    RECORD_FAULTS,
    REPAIRED,
    TOO_LONG,
    BadRecords,
    JsonObject,
    RecordFields,
    RecordNote,
    bad_values,
    broken_note,
)
from seed_multimodal.data.formats.sources import open_records
from seed_multimodal.data.stream.config import LlmDataSettings
from seed_multimodal.data.stream.order import Order, Span
from seed_multimodal.data.stream.packing import Piece, split_long
from seed_multimodal.data.stream.sampler import EpochOrder, even_block
from seed_multimodal.data.stream.views import ImageReader
from seed_multimodal.errors import DataError, pluralize
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX

USABLE_WITHIN = 100  # records tried before a source is rejected
SPLIT_DECODERS = ("pretrain.text", "pretrain.interleaved")
_TOO_LONG_REASONS = {
    "skip": "too long, skipped",
    "truncate": "too long, cut",
    "split": "too long, split",
}


class ReadResult(NamedTuple):
    """The pieces at a position, and a note if the record was skipped or shortened."""

    pieces: list[Piece]
    note: RecordNote | None = None


class DecodedRecord(NamedTuple):
    """The sequence of a record; None: it was skipped.

    note: why it was skipped, or how it was repaired.
    """

    sequence: TrainingSequence | None
    note: RecordNote | None
    location: str  # for messages


class OpenedSource:
    """One source of a mixture: files, decoder and sample order."""

    def __init__(self, settings: LlmDataSettings, index: int, tokenizer: TextTokenizer) -> None:
        """Raises ConfigError: unknown decoder or option; DataError: missing files."""
        source = settings.sources[index]
        self.index = index
        self.settings = source
        self.name = source.name
        self.mixture_seed = settings.seed
        self.seed = zlib.crc32(f"{settings.seed} {source.name}".encode())

        # 1. Files, their decoder, and a reader of images if it needs pixels.
        self.records = open_records(
            source.files,
            format=source.format,
            name=source.name,
            cache=settings.cache,
            options=source.format_options,
            needs_json=not opens_images(source.decoder),
        )
        self.decoder = get_decoder(source.decoder, tokenizer, source.options)
        self.reader: ImageReader | None = None
        if isinstance(self.decoder, FeatureDecoder):
            self.reader = ImageReader(self.decoder, self.records.open_files, source.image_dir)

        # 2. Chunks, and what happens to a sequence that is too long for them; only texts and
        #    interleaved documents can be split.
        self.rows, self.length = settings.chunk_shape(index)
        self.packing = settings.packing
        self.too_long = settings.too_long if settings.packing else "truncate"
        if self.too_long == "split" and source.decoder not in SPLIT_DECODERS:
            self.too_long = "skip"

    @cached_property
    def size(self) -> int:
        """Records of an epoch; the first use indexes the files. Raises DataError: not readable."""
        return len(self.records)

    @cached_property
    def order(self) -> EpochOrder:
        """The order of the records; those of a single shard are shuffled among each other."""
        shard_sizes = self.records.shard_sizes
        if len(shard_sizes) == 1:
            return EpochOrder(self.size, self.seed)
        block = even_block(self.size)
        return EpochOrder(self.size, self.seed, shard_sizes=shard_sizes, block=block)

    def decode(self, index: int, rng: SeededRandom, max_length: int | None = None) -> DecodedRecord:
        """A record's sequence, truncated as by the original decoder."""
        location = ""
        try:
            record = self.records.read(index)
            location = record.location
            with bad_values(location):
                fields = record.fields if self.reader is None else self.reader.fields(record)
                sequence = self.decoder.decode(fields, rng, max_length)
        except RECORD_FAULTS as error:
            return DecodedRecord(None, broken_note(error, location), location)
        if sequence.drop_reason or not sequence.ids:
            reason = sequence.drop_reason or "empty"
            return DecodedRecord(None, RecordNote(DROPPED, reason, location), location)
        note = None
        if sequence.repaired:
            note = RecordNote(REPAIRED, sequence.repaired, location)
        return DecodedRecord(sequence, note, location)

    def read(self, position: int) -> ReadResult:
        """The sequence at a position of the endless order, as pieces that fit into rows."""
        # 1. Read and decode the record.
        ((_, index),) = self.order.samples(position, 1)
        rng = SeededRandom(self.mixture_seed, self.seed, position)
        max_length = None if self.too_long == "split" else self.length
        sequence, note, location = self.decode(index, rng, max_length)
        if sequence is None:
            return ReadResult([], note)
        n_tokens = len(sequence) + sequence.n_truncated
        if n_tokens > self.length:
            detail = f"{location} ({n_tokens} tokens, rows have {self.length})"
            note = RecordNote(TOO_LONG, _TOO_LONG_REASONS[self.too_long], detail)
            if self.too_long == "skip":
                return ReadResult([], note)

        # 2. Split it, and cut its images into views.
        try:
            with bad_values(location):
                pieces = self._pieces(position, sequence)
        except RECORD_FAULTS as error:
            return ReadResult([], broken_note(error, location))
        if not pieces:
            return ReadResult([], RecordNote(DROPPED, "nothing to learn in it", location))
        return ReadResult(pieces, note)

    def _pieces(self, position: int, sequence: TrainingSequence) -> list[Piece]:
        """The sequence's pieces with something to learn.

        One with images as pixels is never split.
        """
        ids = np.array(sequence.ids, np.int32)
        labels = np.array(sequence.labels, np.int32)
        if self.reader is not None and isinstance(sequence, ImageSequence):
            return [Piece(self.index, position, 0, ids, labels, self.reader.cut(sequence))]
        arrays = split_long(ids, labels, self.length, self.decoder.vocabulary)
        if self.packing:
            arrays = [(ids, labels) for ids, labels in arrays if (labels[1:] != IGNORE_INDEX).any()]
        return [
            Piece(self.index, position, index, ids, labels)
            for index, (ids, labels) in enumerate(arrays)
        ]


class Mixture:
    """The opened sources of an LLM's data."""

    def __init__(self, settings: LlmDataSettings, tokenizer: TextTokenizer) -> None:
        """Raises ConfigError: unknown decoder or option; DataError: missing or unreadable files."""
        self.settings = settings
        self.sources = [
            OpenedSource(settings, index, tokenizer) for index in range(len(settings.sources))
        ]
        # The files are indexed here, before workers are forked.
        self.order = Order(
            settings.sampling_weights(),
            [source.size for source in self.sources],
            settings.seed,
            [source.settings.cycles for source in self.sources],
            [source.order.block for source in self.sources],
            settings.concat_type,
        )

    def read(self, source: int, span: Span) -> list[ReadResult]:
        """The records at some positions of a source."""
        results = []
        for position in range(span.start, span.stop):
            pieces, note = self.sources[source].read(position)
            if span.pieces is not None:
                pieces = [piece for piece in pieces if piece.index in span.pieces]
            results.append(ReadResult(pieces, note))
        return results

    def check_usable(self) -> None:
        """Raise DataError if none of a source's first records is usable."""
        for source in self.sources:
            count = min(source.size, max(USABLE_WITHIN, self.settings.max_bad_in_a_row))
            if any(source.read(position).pieces for position in range(count)):
                continue
            first = source.read(0).note
            assert first is not None
            reason = "" if first.kind == BROKEN else f": {first.reason}."
            raise DataError(
                f"Source {source.name}: no usable record ({pluralize(count, 'record')} tried); "
                f"the first: {first.location}{reason}"
            )


def merge_counts(into: JsonObject, counts: RecordFields) -> None:
    """Add a source's counts from another process or run."""
    skipped = BadRecords(counts=into["skipped"])
    skipped.merge(counts["skipped"])
    for key in into:
        if key != "skipped":
            into[key] += counts[key]
