"""Mixture of an LLM's training sources: selection of a source for each chunk, sequences by
position.

Positions run through a source's epochs endlessly; randomness in decoding is determined by (seed,
source, position).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from seed_multimodal.data.decoders import FEATURE_DECODERS, get_decoder
from seed_multimodal.data.decoders.base import Decoder, SeededRandom, TrainingSequence
from seed_multimodal.data.decoders.seed_x import FeatureDecoder, ImageSequence
from seed_multimodal.data.formats.record import RECORD_FAULTS, JsonObject, RecordFields, bad_values
from seed_multimodal.data.formats.sources import FileRecords, open_records
from seed_multimodal.data.stream.config import LlmDataSettings
from seed_multimodal.data.stream.packing import split_long
from seed_multimodal.data.stream.sampler import EpochOrder, even_block
from seed_multimodal.data.stream.views import ImageReader, SequenceViews
from seed_multimodal.errors import DataError, pluralize
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX

USABLE_WITHIN = 100  # records tried before a source is rejected
ENDLESS = 2**62
RUNS_PER_EPOCH = 4  # of each rank, at least
SPLIT_DECODERS = ("pretrain.text", "pretrain.interleaved")
BROKEN = "broken"
DROPPED = "dropped"
TOO_LONG = "too long"
LISTED_RECORDS = 5  # per skip reason
_TOO_LONG_REASONS = {
    "skip": "too long, skipped",
    "truncate": "too long, cut",
    "split": "too long, split",
}
_64_BITS = (1 << 64) - 1


class SkippedRecord(NamedTuple):
    """A record that was skipped, truncated or split."""

    kind: str  # BROKEN, DROPPED or TOO_LONG
    reason: str
    location: str  # file and line or sample, or the error message of a broken record


@dataclass
class Piece:
    """A sequence that fits into a row, and its images' views."""

    source: int
    position: int  # of its record in the source's order
    index: int  # among the pieces of its record
    ids: np.ndarray  # int32 [n]
    labels: np.ndarray  # int32 [n]
    views: SequenceViews | None = None

    def __len__(self) -> int:
        return len(self.ids)


class ReadResult(NamedTuple):
    """The pieces at a position, and a note if the record was skipped or shortened."""

    pieces: list[Piece]
    note: SkippedRecord | None = None


def _broken_record(error: Exception, location: str) -> SkippedRecord:
    """A broken record, by the error of reading or decoding it."""
    message = str(error) if str(error).startswith(location) else f"{location}: {error}"
    return SkippedRecord(BROKEN, getattr(error, "kind", "broken record"), message)


def _record_order(records: FileRecords, seed: int) -> EpochOrder:
    """The order of a source's records; those of a single shard are shuffled among each other."""
    layout = records.layout
    total = len(records)
    if len(layout.sizes) == 1:
        return EpochOrder(total, seed)
    return EpochOrder(total, seed, layout=layout, block=even_block(total))


class Mixture:
    """Opened sources with decoders and sample orders; each list has one entry for each source.

    sizes: records of an epoch. They are counted here, so that indexes are built before workers are
        forked.
    limits: positions of all cycles.
    """

    def __init__(self, settings: LlmDataSettings, tokenizer: MultimodalTokenizer) -> None:
        """Raises ConfigError: unknown decoder or option; DataError: missing or unreadable files."""
        self.settings = settings
        self.sources = settings.sources
        self.weights = settings.sampling_weights()
        self.records: list[FileRecords] = []
        self.decoders: list[Decoder] = []
        self.readers: list[ImageReader | None] = []
        self.sizes: list[int] = []
        self.limits: list[int] = []
        self.seeds: list[int] = []
        self.orders: list[EpochOrder] = []

        # 1. Open the files, which reports missing ones before anything is read.
        for source in self.sources:
            records = open_records(
                source.files,
                format=source.format,
                name=source.name,
                cache=settings.cache,
                options=source.format_options,
                needs_json=source.decoder not in FEATURE_DECODERS,
            )
            self.records.append(records)

        # 2. Decoders, and readers of images for those that need pixels.
        for source, records in zip(self.sources, self.records, strict=True):
            decoder = get_decoder(source.decoder, tokenizer, source.options)
            reader = None
            if isinstance(decoder, FeatureDecoder):
                reader = ImageReader(decoder, records.open_files, source.image_dir)
            self.decoders.append(decoder)
            self.readers.append(reader)

        # 3. Sizes, which index the files, and orders.
        for source, records in zip(self.sources, self.records, strict=True):
            size = len(records)
            seed = zlib.crc32(f"{settings.seed} {source.name}".encode())
            self.sizes.append(size)
            self.limits.append((source.cycles or ENDLESS) * size)
            self.seeds.append(seed)
            self.orders.append(_record_order(records, seed))

    def decode(
        self, source: int, index: int, rng: SeededRandom, max_length: int | None = None
    ) -> tuple[TrainingSequence, str] | SkippedRecord:
        """(sequence of a record, truncated as by the original decoder.

        Its location), or why it was skipped.
        """
        location = ""
        reader = self.readers[source]
        try:
            record = self.records[source].read(index)
            location = record.location
            with bad_values(location):
                fields = record.fields if reader is None else reader.fields(record)
                sequence = self.decoders[source].decode(fields, rng, max_length)
        except RECORD_FAULTS as error:
            return _broken_record(error, location)
        if sequence.drop_reason or not sequence.ids:
            return SkippedRecord(DROPPED, sequence.drop_reason or "empty", location)
        return sequence, location

    def sequence(
        self, source: int, position: int, max_length: int | None = None
    ) -> tuple[TrainingSequence, str] | SkippedRecord:
        """`decode` of the record at a position of a source's endless order."""
        ((_, indices),) = self.orders[source].parts(position, 1)
        rng = SeededRandom(self.settings.seed, self.seeds[source], position)
        return self.decode(source, int(indices[0]), rng, max_length)

    def read_chunk(self, source: int, start: int) -> list[ReadResult]:
        """The records of a chunk; fewer at the end of a source's cycles."""
        end = min(start + self.settings.chunk_shape(source)[0], self.limits[source])
        return [self.read(source, position) for position in range(start, end)]

    def read(self, source: int, position: int) -> ReadResult:
        """The sequence at a position, as pieces that fit into rows."""
        # 1. What happens to a sequence that is too long; only texts and interleaved documents can
        #    be split.
        length = self.settings.chunk_shape(source)[1]
        too_long = self.settings.too_long if self.settings.packing else "truncate"
        if too_long == "split" and self.sources[source].decoder not in SPLIT_DECODERS:
            too_long = "skip"

        # 2. Read and decode the record.
        decoded = self.sequence(source, position, None if too_long == "split" else length)
        if isinstance(decoded, SkippedRecord):
            return ReadResult([], decoded)
        sequence, location = decoded
        n_tokens = len(sequence) + sequence.n_truncated
        note = None
        if n_tokens > length:
            detail = f"{location} ({n_tokens} tokens, rows have {length})"
            note = SkippedRecord(TOO_LONG, _TOO_LONG_REASONS[too_long], detail)
            if too_long == "skip":
                return ReadResult([], note)

        # 3. Split it, and cut its images into views.
        try:
            with bad_values(location):
                pieces = self._pieces(source, position, sequence)
        except RECORD_FAULTS as error:
            return ReadResult([], _broken_record(error, location))
        if not pieces:
            return ReadResult([], SkippedRecord(DROPPED, "nothing to learn in it", location))
        return ReadResult(pieces, note)

    def _pieces(self, source: int, position: int, sequence: TrainingSequence) -> list[Piece]:
        """The sequence's pieces with something to learn.

        One with images as pixels is never split.
        """
        ids = np.array(sequence.ids, np.int32)
        labels = np.array(sequence.labels, np.int32)
        reader = self.readers[source]
        if reader is not None and isinstance(sequence, ImageSequence):
            return [Piece(source, position, 0, ids, labels, reader.cut(sequence))]
        length = self.settings.chunk_shape(source)[1]
        arrays = split_long(ids, labels, length, self.decoders[source].vocabulary)
        if self.settings.packing:
            arrays = [(ids, labels) for ids, labels in arrays if (labels[1:] != IGNORE_INDEX).any()]
        return [
            Piece(source, position, index, ids, labels)
            for index, (ids, labels) in enumerate(arrays)
        ]

    def run_length(self, source: int, world: int) -> int:
        """Neighbouring chunks of a rank: about a shuffled block, so that few ranks read the same
        data.
        """
        rows = self.settings.chunk_shape(source)[0]
        longest = self.sizes[source] // (RUNS_PER_EPOCH * world * rows)
        return max(1, min(self.orders[source].block_size // rows, longest))

    def choose_source(
        self, counts: Sequence[int], available: Sequence[bool], index: int
    ) -> int | None:
        """The source of chunk `index`; None: none is available.

        counts: chunks of each source before this one.
        available: sources that are not exhausted.
        """
        candidates = [source for source, is_available in enumerate(available) if is_available]
        if not candidates:
            return None
        if self.settings.concat_type == "concat":
            return candidates[0]
        if self.settings.concat_type == "mux_longest":
            return min(candidates, key=lambda source: counts[source])  # the first of the rarest

        # Weighted sampling: walk along the weights to a random point.
        total = sum(self.weights[source] for source in candidates)
        point = uniform(self.settings.seed, index) * total
        for source in candidates:
            point -= self.weights[source]
            if point < 0:
                return source
        return candidates[-1]

    def check_usable(self) -> None:
        """Raise DataError if none of a source's first records is usable."""
        for source, size in enumerate(self.sizes):
            count = min(size, max(USABLE_WITHIN, self.settings.max_bad_in_a_row))
            if any(self.read(source, position).pieces for position in range(count)):
                continue
            first = self.read(source, 0).note
            assert first is not None
            reason = "" if first.kind == BROKEN else f": {first.reason}."
            raise DataError(
                f"Source {self.sources[source].name}: no usable record "
                f"({pluralize(count, 'record')} tried); the first: {first.location}{reason}"
            )


def uniform(seed: int, index: int) -> float:
    """A float in [0, 1) determined by two integers (SplitMix64 mixing)."""
    state = seed & _64_BITS
    for value in (index, 0x5EED):
        state = ((state ^ value) + 0x9E3779B97F4A7C15) & _64_BITS
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _64_BITS
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


def merge_counts(into: JsonObject, counts: RecordFields) -> None:
    """Add a source's counts from another process or run."""
    for reason, skipped in counts["skipped"].items():
        add_skipped(into["skipped"], reason, skipped["count"], skipped["first"])
    for key in into:
        if key != "skipped":
            into[key] += counts[key]


def add_skipped(group: JsonObject, reason: str, count: int, locations: list[str]) -> bool:
    """Count skipped records and list the first few; returns whether one was added to the list."""
    before = group.get(reason, {"count": 0, "first": []})
    listed = [*dict.fromkeys([*before["first"], *locations])][:LISTED_RECORDS]
    group[reason] = {"count": before["count"] + count, "first": listed}
    return len(listed) > len(before["first"])
