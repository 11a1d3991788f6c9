"""The sources of an LLM's training data: which one a draw reads, and the sequence at a position of one.

    mixture = Mixture(settings, tokenizer)
    mixture.sequence(source=0, position=1234, max_length=None)

Positions count through a source's epochs without end: an epoch is a permutation of the source (`order.EpochOrder`)
and what is random in decoding is a function of (seed, source, position).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from seed_multimodal.data.decoders import FEATURE_DECODERS, get_decoder
from seed_multimodal.data.decoders.base import IGNORED, Decoder, SeededDraws, TokenSequence
from seed_multimodal.data.decoders.opened import OpenedDecoder, PictureSequence
from seed_multimodal.data.formats.sources import FileRecords, open_records
from seed_multimodal.data.stream.data_settings import LlmDataSettings, SourceSettings
from seed_multimodal.data.stream.order import EpochOrder
from seed_multimodal.data.stream.packing import split_long
from seed_multimodal.data.stream.skip_budget import BROKEN, DROPPED, TOO_LONG, SkippedSample
from seed_multimodal.data.stream.views import TAR_PARTS, PictureReader, SequenceViews
from seed_multimodal.errors import ConfigError, DataError, SeedError, counted
from seed_multimodal.language.tokenizer import MultimodalTokenizer

USABLE_WITHIN = 100
_BITS = (1 << 64) - 1
SPLIT_DECODERS = ("pretrain.text",)
_WORDS = {"skip": "skipped", "truncate": "cut", "split": "split"}
Found = tuple[TokenSequence, str]  # and the place of its record


class Piece(NamedTuple):
    """A sequence, or a piece of a split document (int32 [n] ids and labels), and its images' views."""

    ids: np.ndarray
    labels: np.ndarray
    views: SequenceViews | None = None


class Read(NamedTuple):
    """What a position gives: pieces, and a note if the record was skipped or shortened."""

    pieces: list[Piece]
    note: SkippedSample | None = None


class EndOfData(DataError):
    """Every source of the mixture is used up (all have finite `cycles`)."""


class Mixture:
    """The opened sources with their decoders and orders.

    Raises:
        ConfigError: an unknown decoder or option. DataError: no files, or files that cannot be indexed.
    """

    def __init__(self, settings: LlmDataSettings, tokenizer: MultimodalTokenizer) -> None:
        self.settings = settings
        self.names = [source.name for source in settings.sources]
        self.choice = SourceChoice(settings.draw_weights(), settings.concat_type, settings.seed)
        self.records = [open_records(source.files, format=source.format, name=source.name,
                                     cache=settings.cache, options=source.format_options,
                                     others=TAR_PARTS if source.decoder in FEATURE_DECODERS else None)
                        for source in settings.sources]
        self.decoders = [_decoder(source, tokenizer) for source in settings.sources]
        self.readers = [PictureReader(decoder, records.open_files, source.image_dir)
                        if isinstance(decoder, OpenedDecoder) else None
                        for source, records, decoder in zip(settings.sources, self.records, self.decoders, strict=True)]
        sides = {one.options.base_resolution for one in self.decoders if isinstance(one, OpenedDecoder)}
        if len(sides) > 1:
            raise ConfigError(f"The views of all sources need one size; base_resolution is {sorted(sides)}.")
        self.sizes = [len(records) for records in self.records]  # indexes the files, before workers are forked
        self.limits = [None if source.cycles is None else source.cycles * size
                       for source, size in zip(settings.sources, self.sizes, strict=True)]
        self.seeds = [zlib.crc32(f"{settings.seed} {name}".encode()) for name in self.names]
        # near an epoch's end two are read at once, of tiny sources more
        self.orders = [EpochOrder(size, seed, sizes=records.shard_sizes, keep=2 if size > 100_000 else 16,
                                  block=settings.shuffle_block if len(records.shard_sizes) > 1 else 0)
                       for size, seed, records in zip(self.sizes, self.seeds, self.records, strict=True)]

    def sequence(self, source: int, position: int, max_length: int | None = None) -> Found | SkippedSample:
        """(the sequence at a position of a source's endless order, the place of its record), or why there is none.

        Args:
            max_length: None: the whole sequence; a number: cut as the original decoder cuts.
        """
        (_, indices), = self.orders[source].parts(position, 1)
        draws = SeededDraws(self.settings.seed, self.seeds[source], position)
        return read_sequence(self.records[source], int(indices[0]), self.decoders[source], self.readers[source], draws,
                             max_length, source)

    def read(self, source: int, position: int) -> Read:
        """The sequence at a position as pieces that fit the rows: packed ones of `length`, padded ones of the source's
        `max_length`."""
        settings, reader = self.settings, self.readers[source]
        length = settings.length if settings.packing else settings.padded_shape(source)[1]
        too_long = settings.too_long if settings.packing else "truncate"
        if too_long == "split" and settings.sources[source].decoder not in SPLIT_DECODERS:
            too_long = "skip"
        # Decoders with images know themselves where a sequence may be cut.
        found = self.sequence(source, position, None if reader is None else length)
        if isinstance(found, SkippedSample):
            return Read([], found)
        sequence, where = found
        cut = sequence.cut if isinstance(sequence, PictureSequence) else 0
        total, note = len(sequence) + cut, None
        if total > length:
            note = SkippedSample(source, TOO_LONG, _WORDS[too_long],
                                 f"{where} ({total} tokens, rows have {length})")
            if too_long == "skip":
                return Read([], note)
        if reader is not None and isinstance(sequence, PictureSequence):
            return Read([Piece(*_arrays(sequence), reader.cut(sequence))], note)
        if note and too_long == "truncate":
            found = self.sequence(source, position, length)
            if isinstance(found, SkippedSample):
                return Read([], found)
            sequence = found[0]
        ids, labels = _arrays(sequence)
        pieces = split_long(ids, labels, length) if too_long == "split" else [(ids[:length], labels[:length])]
        kept = [Piece(*one) for one in pieces if not settings.packing or (one[1][1:] != IGNORED).any()]
        return Read(kept, note) if kept else Read([], SkippedSample(source, DROPPED, "nothing to learn in it", where))

    def check_usable(self) -> None:
        """Read the first record of each source that training can use.

        Raises:
            DataError: a source has none among its first ones in training's order.
        """
        for source, name in enumerate(self.names):
            count = min(self.sizes[source], max(USABLE_WITHIN, self.settings.max_bad_in_a_row))
            first: SkippedSample | None = None
            for position in range(count):
                read = self.read(source, position)
                if read.pieces:
                    break
                first = first or read.note
            else:
                assert first is not None
                reason = "too long" if first.kind == TOO_LONG else first.reason
                raise DataError(f"Source {name}: no record can be used ({counted(count, 'record')} tried); the first: "
                                + (first.where if first.kind == BROKEN else f"{first.where}: {reason}."))

    def end_of_data(self) -> EndOfData:
        """The error for a mixture that is used up."""
        used = ", ".join(f"{source.name} {source.cycles}x" for source in self.settings.sources)
        return EndOfData(f"All sources are used up (cycles: {used}): ask for fewer steps, raise cycles, or leave "
                         f"cycles out for no end.")


def _arrays(sequence: TokenSequence) -> tuple[np.ndarray, np.ndarray]:
    return np.array(sequence.ids, np.int32), np.array(sequence.labels, np.int32)


def read_sequence(records: FileRecords, index: int, decoder: Decoder, reader: PictureReader | None, draws: SeededDraws,
                  max_length: int | None = None, source: int = 0) -> Found | SkippedSample:
    """(the sequence of a record, its place), or why there is none: for training and for `seed data check`.

    Args:
        reader: of a decoder that opens pictures. max_length: as of `Mixture.sequence`. source: number in the result.
    """
    where = ""
    try:
        record = records.read(index)
        where = record.where
        made = decoder.decode(record.fields if reader is None else reader.fields(record), draws, max_length)
    except ConfigError:
        raise
    except SeedError as error:
        sentence = str(error)
        if where and not sentence.startswith(where):
            sentence = f"{where}: {sentence}"
        return SkippedSample(source, BROKEN, getattr(error, "kind", "broken record"), sentence)
    if made.dropped or not made.ids:
        return SkippedSample(source, DROPPED, made.dropped or "empty", where)
    return made, where


def _decoder(source: SourceSettings, tokenizer: MultimodalTokenizer) -> Decoder:
    try:
        return get_decoder(source.decoder, tokenizer, source.options)
    except ConfigError as error:
        raise ConfigError(f"source {source.name}: {error}") from None


class SourceChoice:
    """Which source a draw takes, by the mixture's `concat_type`, among those that are not used up."""

    def __init__(self, weights: Sequence[float], concat_type: str, seed: int) -> None:
        self.weights, self.concat_type, self.seed = list(weights), concat_type, seed

    def __call__(self, counts: Sequence[int], alive: Sequence[bool], number: int) -> int | None:
        """The source of a draw, or None when all are used up.

        Args:
            counts: earlier draws from each source. alive: whether each has something left.
        """
        left = [index for index, there in enumerate(alive) if there]
        if not left:
            return None
        if self.concat_type == "concat":
            return left[0]
        if self.concat_type == "mux_longest":
            return min(left, key=lambda index: counts[index])  # the first of those drawn least
        place = uniform(self.seed, number) * sum(self.weights[index] for index in left)
        for index in left:
            place -= self.weights[index]
            if place < 0:
                return index
        return left[-1]


def uniform(seed: int, number: int) -> float:
    """A number in [0, 1) that is a function of whole numbers (SplitMix64's mixing, once for each)."""
    state = seed & _BITS
    for part in (number, 0x5EED):
        state = (state ^ part) + 0x9E3779B97F4A7C15 & _BITS
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _BITS
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _BITS
        state ^= state >> 31
    return (state >> 11) / (1 << 53)
