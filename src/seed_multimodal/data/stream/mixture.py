"""Mixture of an LLM's training sources: selection of a source per draw, samples by position.

Positions run through a source's epochs endlessly; randomness in decoding is determined by (seed, source, position).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from seed_multimodal.data.decoders import FEATURE_DECODERS, get_decoder
from seed_multimodal.data.decoders.base import SeededRandom, TrainingSequence
from seed_multimodal.data.decoders.seed_x import FeatureDecoder, ImageSequence
from seed_multimodal.data.formats.record import RECORD_FAULTS, bad_values
from seed_multimodal.data.formats.sources import FileRecords, open_records
from seed_multimodal.data.stream.config import LlmDataSettings
from seed_multimodal.data.stream.packing import split_long
from seed_multimodal.data.stream.sampler import EpochOrder, even_block
from seed_multimodal.data.stream.views import ImageReader, SequenceViews
from seed_multimodal.errors import DataError, pluralize
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX

USABLE_WITHIN, ENDLESS = 100, 2**62
RUNS_PER_EPOCH = 4  # of each rank, at least
SPLIT_DECODERS = ("pretrain.text", "pretrain.interleaved")
BROKEN, DROPPED, TOO_LONG = "broken", "dropped", "too long"
NAMED = 5  # records listed per skip reason
_WORDS = {"skip": "too long, skipped", "truncate": "too long, cut", "split": "too long, split"}
_BITS = (1 << 64) - 1


class SkippedRecord(NamedTuple):
    """A record that was skipped, truncated or split: BROKEN, DROPPED or TOO_LONG; short reason; file and line or
    sample, or the error message of a broken record."""

    kind: str
    reason: str
    location: str


@dataclass
class Piece:
    """A sequence (int32 [n] ids and labels) and its images' views; `number`: index at its position."""

    source: int
    position: int
    number: int
    ids: np.ndarray
    labels: np.ndarray
    views: SequenceViews | None = None

    def __len__(self) -> int:
        return len(self.ids)


class Read(NamedTuple):
    """The pieces at a position, and a note if the record was skipped or shortened."""

    pieces: list[Piece]
    note: SkippedRecord | None = None


def _broken(error: Exception, where: str) -> SkippedRecord:
    """A broken record, by the error of reading or decoding it."""
    message = str(error) if str(error).startswith(where) else f"{where}: {error}"
    return SkippedRecord(BROKEN, getattr(error, "kind", "broken record"), message)


def _order(records: FileRecords, seed: int) -> EpochOrder:
    """The order of a source's records; those of a single shard are shuffled among each other."""
    layout, total = records.layout, len(records)
    if len(layout.sizes) == 1:
        return EpochOrder(total, seed)
    return EpochOrder(total, seed, layout=layout, block=even_block(total))


class Mixture:
    """Opened sources with decoders and sample orders."""

    def __init__(self, settings: LlmDataSettings, tokenizer: MultimodalTokenizer) -> None:
        """Raises ConfigError: unknown decoder or option; DataError: missing or unreadable files."""
        self.settings, self.sources, self.weights = (
            settings,
            settings.sources,
            settings.sampling_weights(),
        )
        self.records = [
            open_records(
                source.files,
                format=source.format,
                name=source.name,
                cache=settings.cache,
                options=source.format_options,
                needs_json=source.decoder not in FEATURE_DECODERS,
            )
            for source in self.sources
        ]
        self.decoders = [
            get_decoder(source.decoder, tokenizer, source.options) for source in self.sources
        ]
        self.readers = [
            ImageReader(decoder, records.open_files, source.image_dir)
            if isinstance(decoder, FeatureDecoder)
            else None
            for source, records, decoder in zip(
                self.sources, self.records, self.decoders, strict=True
            )
        ]
        self.sizes = [
            len(records) for records in self.records
        ]  # builds the indexes before workers are forked
        self.limits = [
            (source.cycles or ENDLESS) * size
            for source, size in zip(self.sources, self.sizes, strict=True)
        ]
        self.seeds = [
            zlib.crc32(f"{settings.seed} {source.name}".encode()) for source in self.sources
        ]
        self.orders = [
            _order(records, seed) for seed, records in zip(self.seeds, self.records, strict=True)
        ]

    def decode(
        self, source: int, index: int, draws: SeededRandom, max_length: int | None = None
    ) -> tuple[TrainingSequence, str] | SkippedRecord:
        """(sequence of a record, truncated as by the original decoder; its location), or why it was skipped."""
        where, reader = "", self.readers[source]
        try:
            record = self.records[source].read(index)
            where = record.location
            with bad_values(where):
                fields = record.fields if reader is None else reader.fields(record)
                made = self.decoders[source].decode(fields, draws, max_length)
        except RECORD_FAULTS as error:
            return _broken(error, where)
        if made.drop_reason or not made.ids:
            return SkippedRecord(DROPPED, made.drop_reason or "empty", where)
        return made, where

    def sequence(
        self, source: int, position: int, max_length: int | None = None
    ) -> tuple[TrainingSequence, str] | SkippedRecord:
        """`decode` of the record at a position of a source's endless order."""
        ((_, indices),) = self.orders[source].parts(position, 1)
        return self.decode(
            source,
            int(indices[0]),
            SeededRandom(self.settings.seed, self.seeds[source], position),
            max_length,
        )

    def read_chunk(self, source: int, start: int) -> list[Read]:
        """The reads of a draw; fewer at the end of a source's cycles."""
        end = min(start + self.settings.chunk_shape(source)[0], self.limits[source])
        return [self.read(source, position) for position in range(start, end)]

    def read(self, source: int, position: int) -> Read:
        """The sequence at a position, as pieces that fit into rows."""
        settings, length = self.settings, self.settings.chunk_shape(source)[1]
        too_long = settings.too_long if settings.packing else "truncate"
        if too_long == "split" and self.sources[source].decoder not in SPLIT_DECODERS:
            too_long = "skip"
        found = self.sequence(source, position, None if too_long == "split" else length)
        if isinstance(found, SkippedRecord):
            return Read([], found)
        sequence, where = found
        total, note = len(sequence) + sequence.n_truncated, None
        if total > length:
            note = SkippedRecord(
                TOO_LONG, _WORDS[too_long], f"{where} ({total} tokens, rows have {length})"
            )
            if too_long == "skip":
                return Read([], note)
        try:
            with bad_values(where):
                pieces = self._pieces(source, position, sequence)
        except RECORD_FAULTS as error:
            return Read([], _broken(error, where))
        if not pieces:
            return Read([], SkippedRecord(DROPPED, "nothing to learn in it", where))
        return Read(pieces, note)

    def _pieces(self, source: int, position: int, sequence: TrainingSequence) -> list[Piece]:
        """The sequence's pieces with something to learn; one with images as pixels is whole."""
        ids, labels = np.array(sequence.ids, np.int32), np.array(sequence.labels, np.int32)
        reader = self.readers[source]
        if reader is not None and isinstance(sequence, ImageSequence):
            return [Piece(source, position, 0, ids, labels, reader.cut(sequence))]
        length = self.settings.chunk_shape(source)[1]
        arrays = split_long(ids, labels, length, self.decoders[source].vocabulary)
        if self.settings.packing:
            arrays = [piece for piece in arrays if (piece[1][1:] != IGNORE_INDEX).any()]
        return [Piece(source, position, number, *piece) for number, piece in enumerate(arrays)]

    def run_length(self, source: int, world: int) -> int:
        """Draws of a rank from neighbouring positions: about a shuffled block, so that few ranks read the same data."""
        rows = self.settings.chunk_shape(source)[0]
        longest = self.sizes[source] // (RUNS_PER_EPOCH * world * rows)
        return max(1, min(self.orders[source].block_size // rows, longest))

    def choice(self, counts: Sequence[int], alive: Sequence[bool], number: int) -> int | None:
        """The source of draw `number`, after `counts` draws of each, among the `alive` ones; None: none is left."""
        left = [index for index, there in enumerate(alive) if there]
        if not left or self.settings.concat_type == "concat":
            return left[0] if left else None
        if self.settings.concat_type == "mux_longest":
            return min(left, key=lambda index: counts[index])  # the first of the least drawn
        place = uniform(self.settings.seed, number) * sum(self.weights[index] for index in left)
        for index in left:
            place -= self.weights[index]
            if place < 0:
                return index
        return left[-1]

    def check_usable(self) -> None:
        """Raise DataError if none of a source's first records is usable."""
        for source, size in enumerate(self.sizes):
            count = min(size, max(USABLE_WITHIN, self.settings.max_bad_in_a_row))
            if any(self.read(source, position).pieces for position in range(count)):
                continue
            first = self.read(source, 0).note
            assert first is not None
            raise DataError(
                f"Source {self.sources[source].name}: no usable record "
                f"({pluralize(count, 'record')} tried); the first: {first.location}"
                + ("" if first.kind == BROKEN else f": {first.reason}.")
            )


def uniform(seed: int, number: int) -> float:
    """A number in [0, 1) determined by two integers (SplitMix64 mixing)."""
    state = seed & _BITS
    for part in (number, 0x5EED):
        state = (state ^ part) + 0x9E3779B97F4A7C15 & _BITS
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _BITS
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _BITS
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


def merge_counts(into: dict[str, Any], counts: Mapping[str, Any]) -> None:
    """Add a source's counts from another process or run."""
    for reason, more in counts["skipped"].items():
        add_skipped(into["skipped"], reason, more["count"], more["first"])
    into.update({key: own + counts[key] for key, own in into.items() if key != "skipped"})


def add_skipped(group: dict[str, Any], reason: str, count: int, places: list[str]) -> bool:
    """Count skipped records and list the first few; returns whether one was added to the list."""
    before = group.get(reason, {"count": 0, "first": []})
    group[reason] = {
        "count": before["count"] + count,
        "first": [*dict.fromkeys([*before["first"], *places])][:NAMED],
    }
    return len(group[reason]["first"]) > len(before["first"])
