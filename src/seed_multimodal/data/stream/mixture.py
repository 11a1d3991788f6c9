"""Mixture of an LLM's training sources: selection of a source for each chunk, sequences by
position.

Positions run through a source's epochs endlessly; randomness in decoding is determined by (seed,
source, position).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from seed_multimodal.data.decoders import get_decoder, opens_images
from seed_multimodal.data.decoders.base import SeededRandom, TrainingSequence
from seed_multimodal.data.decoders.features import FeatureDecoder, ImageSequence
from seed_multimodal.data.formats.record import RECORD_FAULTS, JsonObject, RecordFields, bad_values
from seed_multimodal.data.formats.sources import open_records
from seed_multimodal.data.stream.config import LlmDataSettings
from seed_multimodal.data.stream.packing import split_long
from seed_multimodal.data.stream.sampler import EpochOrder, even_block
from seed_multimodal.data.stream.views import ImageReader, SequenceViews
from seed_multimodal.errors import DataError, pluralize
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX

USABLE_WITHIN = 100  # records tried before a source is rejected
ENDLESS = 2**62
RUNS_PER_EPOCH = 4  # of each rank, at least
SPLIT_DECODERS = ("pretrain.text", "pretrain.interleaved")
BROKEN = "broken"
DROPPED = "dropped"
TOO_LONG = "too long"
REPAIRED = "repaired"
LISTED_RECORDS = 5  # per skip reason
_TOO_LONG_REASONS = {
    "skip": "too long, skipped",
    "truncate": "too long, cut",
    "split": "too long, split",
}
_64_BITS = (1 << 64) - 1


class SkippedRecord(NamedTuple):
    """A record that was skipped, truncated, split, or is used without some of its turns."""

    kind: str  # BROKEN, DROPPED, TOO_LONG or REPAIRED
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


class DecodedRecord(NamedTuple):
    """The sequence of a record, and the record's location for messages."""

    sequence: TrainingSequence
    location: str


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

    @property
    def limit(self) -> int:
        """Positions of all cycles."""
        return (self.settings.cycles or ENDLESS) * self.size

    @cached_property
    def order(self) -> EpochOrder:
        """The order of the records; those of a single shard are shuffled among each other."""
        shard_sizes = self.records.shard_sizes
        if len(shard_sizes) == 1:
            return EpochOrder(self.size, self.seed)
        block = even_block(self.size)
        return EpochOrder(self.size, self.seed, shard_sizes=shard_sizes, block=block)

    def run_length(self, world: int) -> int:
        """Neighbouring chunks of a rank: about a shuffled block, so that few ranks read the same
        data.
        """
        longest = self.size // (RUNS_PER_EPOCH * world * self.rows)
        return max(1, min(self.order.block_size // self.rows, longest))

    def decode(
        self, index: int, rng: SeededRandom, max_length: int | None = None
    ) -> DecodedRecord | SkippedRecord:
        """A record's sequence, truncated as by the original decoder, or why it was skipped."""
        location = ""
        try:
            record = self.records.read(index)
            location = record.location
            with bad_values(location):
                fields = record.fields if self.reader is None else self.reader.fields(record)
                sequence = self.decoder.decode(fields, rng, max_length)
        except RECORD_FAULTS as error:
            return _broken_record(error, location)
        if sequence.drop_reason or not sequence.ids:
            return SkippedRecord(DROPPED, sequence.drop_reason or "empty", location)
        return DecodedRecord(sequence, location)

    def sequence(
        self, position: int, max_length: int | None = None
    ) -> DecodedRecord | SkippedRecord:
        """`decode` of the record at a position of the endless order."""
        ((_, indices),) = self.order.parts(position, 1)
        rng = SeededRandom(self.mixture_seed, self.seed, position)
        return self.decode(int(indices[0]), rng, max_length)

    def read(self, position: int) -> ReadResult:
        """The sequence at a position, as pieces that fit into rows."""
        # 1. Read and decode the record.
        max_length = None if self.too_long == "split" else self.length
        decoded = self.sequence(position, max_length)
        if isinstance(decoded, SkippedRecord):
            return ReadResult([], decoded)
        sequence, location = decoded
        n_tokens = len(sequence) + sequence.n_truncated
        note = None
        if sequence.repaired:
            note = SkippedRecord(REPAIRED, sequence.repaired, location)
        if n_tokens > self.length:
            detail = f"{location} ({n_tokens} tokens, rows have {self.length})"
            note = SkippedRecord(TOO_LONG, _TOO_LONG_REASONS[self.too_long], detail)
            if self.too_long == "skip":
                return ReadResult([], note)

        # 2. Split it, and cut its images into views.
        try:
            with bad_values(location):
                pieces = self._pieces(position, sequence)
        except RECORD_FAULTS as error:
            return ReadResult([], _broken_record(error, location))
        if not pieces:
            return ReadResult([], SkippedRecord(DROPPED, "nothing to learn in it", location))
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
    """The opened sources of an LLM's data, and the selection of one for each chunk."""

    def __init__(self, settings: LlmDataSettings, tokenizer: TextTokenizer) -> None:
        """Raises ConfigError: unknown decoder or option; DataError: missing or unreadable files."""
        self.settings = settings
        self.weights = settings.sampling_weights()
        self.sources = [
            OpenedSource(settings, index, tokenizer) for index in range(len(settings.sources))
        ]
        # The files are indexed here, before workers are forked.
        self.sizes = [source.size for source in self.sources]

    def read_chunk(self, source: int, start: int) -> list[ReadResult]:
        """The records of a chunk; fewer at the end of a source's cycles."""
        opened = self.sources[source]
        end = min(start + opened.rows, opened.limit)
        return [opened.read(position) for position in range(start, end)]

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
