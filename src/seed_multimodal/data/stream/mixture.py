"""The sources of an LLM's training data: which one a draw takes, and the sequence at a position of one.

    mixture = Mixture(settings, tokenizer)
    mixture.sequence(source=0, position=1234, max_length=None)

Positions count through a source's epochs without end: an epoch is a permutation of the source (`order.EpochOrder`)
and what is random in decoding is a function of (seed, source, position). So everything here is a pure function of its
arguments; nothing depends on workers, ranks or restarts.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from seed_multimodal.data.decoders import FEATURE_DECODERS, get_decoder
from seed_multimodal.data.decoders.base import Decoder, Draws, SeededDraws, TokenSequence, some_picture
from seed_multimodal.data.decoders.opened import OpenedDecoder, PictureSequence
from seed_multimodal.data.formats.sources import FileRecords, open_records
from seed_multimodal.data.stream.data_settings import LlmDataSettings, SourceSettings
from seed_multimodal.data.stream.order import EpochOrder
from seed_multimodal.data.stream.skip_budget import BROKEN, DROPPED, SkippedSample
from seed_multimodal.data.stream.views import TAR_PARTS, PictureReader, SequenceViews, view_sides
from seed_multimodal.errors import ConfigError, DataError, SeedError
from seed_multimodal.language.tokenizer import MultimodalTokenizer

_BITS = (1 << 64) - 1
Found = tuple[TokenSequence, str]  # and the place of its record


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
        self.decoders = [_decoder(source, records, tokenizer)
                         for source, records in zip(settings.sources, self.records, strict=True)]
        self.readers = [PictureReader(decoder, records.open_files, source.image_dir)
                        if isinstance(decoder, OpenedDecoder) else None
                        for source, records, decoder in zip(settings.sources, self.records, self.decoders, strict=True)]
        sides = view_sides(dict(zip(self.names, self.decoders, strict=True)))
        if len(sides) > 1:
            shown = " and ".join(f"{side} ({name})" for side, name in sides.items())
            raise ConfigError(f"The views of all sources need one size; base_resolution is {shown}.")
        self.sizes = [len(records) for records in self.records]  # indexes the files, before workers are forked
        self.limits = [None if source.cycles is None else source.cycles * size
                       for source, size in zip(settings.sources, self.sizes, strict=True)]
        self.seeds = [zlib.crc32(f"{settings.seed} {name}".encode()) for name in self.names]
        # streams near an epoch's end read from two at once, those of tiny sources from more
        self.orders = [EpochOrder(size, seed, sizes=records.shard_sizes, keep=2 if size > 100_000 else 16,
                                  block=settings.shuffle_block if len(records.shard_sizes) > 1 else 0)
                       for size, seed, records in zip(self.sizes, self.seeds, self.records, strict=True)]

    def index(self, source: int, position: int) -> int:
        """The record at a position of a source's endless order."""
        (_, indices), = self.orders[source].parts(position, 1)
        return int(indices[0])

    def sequence(self, source: int, position: int, max_length: int | None = None) -> Found | SkippedSample:
        """(the sequence, the place of its record), or why there is none.

        Args:
            max_length: None: the whole sequence; a number: cut as the released decoder cuts.
        """
        draws = SeededDraws(self.settings.seed, self.seeds[source], position)
        return read_sequence(self.records[source], self.index(source, position), self.decoders[source],
                             self.readers[source], draws, max_length, source)

    def views(self, source: int, made: TokenSequence) -> SequenceViews | None:
        """The views of a sequence that is used; its opened pictures are let go."""
        reader = self.readers[source]
        return None if reader is None or not isinstance(made, PictureSequence) else reader.cut(made)

    def end_of_data(self) -> EndOfData:
        """The refusal for a mixture that is used up."""
        used = ", ".join(f"{source.name} {source.cycles}x" for source in self.settings.sources)
        return EndOfData(f"All sources are used up (cycles: {used}): ask for fewer steps, raise cycles, or leave "
                         f"cycles out for no end.")


def read_sequence(records: FileRecords, index: int, decoder: Decoder, reader: PictureReader | None, draws: Draws,
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


class OtherPicture:
    """The `noise_source` of a decoder's `code_noise`: a picture of another record of the same source."""

    def __init__(self, records: FileRecords, tokens_per_image: int, n_codes: int) -> None:
        self.records, self.tokens_per_image, self.n_codes = records, tokens_per_image, n_codes

    def __call__(self, draws: Draws) -> list[int]:
        """The codes of some picture.

        Raises:
            DataError: hardly any record has one.
        """
        for _ in range(20):
            try:
                fields = self.records.read(draws.randint(0, len(self.records) - 1)).fields
            except DataError:  # broken: counted at its own draw, not at this one
                continue
            codes = some_picture(fields, draws, self.tokens_per_image)
            if codes and len(codes) == self.tokens_per_image and 0 <= min(codes) <= max(codes) < self.n_codes:
                return codes
        raise DataError(f"{self.records.name}: code_noise takes codes from other pictures, and 20 records in a row "
                        f"have none that is whole.")


def _decoder(source: SourceSettings, records: FileRecords, tokenizer: MultimodalTokenizer) -> Decoder:
    options = dict(source.options)
    if options.get("code_noise"):
        options.setdefault("noise_source", OtherPicture(records, tokenizer.vocabulary.tokens_per_image,
                                                        tokenizer.vocabulary.n_codes))
    try:
        return get_decoder(source.decoder, tokenizer, options)
    except ConfigError as error:
        raise ConfigError(f"source {source.name}: {error}") from None


class SourceChoice:
    """Which source a draw takes, by the mixture's `concat_type`, among those that are not used up."""

    def __init__(self, weights: Sequence[float], concat_type: str, seed: int) -> None:
        self.weights, self.concat_type, self.seed = list(weights), concat_type, seed

    def __call__(self, counts: Sequence[int], alive: Sequence[bool], *numbers: int) -> int | None:
        """The source of the draw numbered `numbers`, or None when all are used up.

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
        place = uniform(self.seed, *numbers) * sum(self.weights[index] for index in left)
        for index in left:
            place -= self.weights[index]
            if place < 0:
                return index
        return left[-1]


def uniform(seed: int, *numbers: int) -> float:
    """A number in [0, 1) that is a function of whole numbers (SplitMix64's mixing, once for each)."""
    state = seed & _BITS
    for number in (*numbers, 0x5EED):
        state = (state ^ number) + 0x9E3779B97F4A7C15 & _BITS
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _BITS
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _BITS
        state ^= state >> 31
    return (state >> 11) / (1 << 53)
