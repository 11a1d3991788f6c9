"""Record → training sequence: seeded random choices, field checks, segments as ids and labels.

As in the original data code, each segment of texts and images is encoded separately; `<s>` and
segments with `learned=False` have the label -100. Decoders with `learns_all` learn every other
token except `<unk>`, the original's padding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from seed_multimodal.data.formats.record import BadRecord, JsonObject, RecordFields, shorten
from seed_multimodal.language.hub_tokenizer import load_text_tokenizer
from seed_multimodal.language.prompts import merge_text
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX, Ids
from seed_multimodal.settings import read_settings

BLANK_CAPTION = " \t\r\n;,[]{}'\".?:"  # a caption of only these characters is blank
T = TypeVar("T")
Codes = list[int]  # of one image
# A text, or an image in the form that the decoder's `image_ids` encodes: codes or an opened image.
SegmentPart = Any
OptionValues = Mapping[str, Any]  # options of a decoder, as configured


@dataclass
class TrainingSequence:
    """Token ids and labels of equal length.

    extra: further values that the original returns (`text`).
    drop_reason: why the sample is skipped, or empty.
    n_truncated: tokens removed at the end.
    """

    ids: list[int]
    labels: list[int]
    extra: JsonObject = field(default_factory=dict)
    drop_reason: str = ""
    n_truncated: int = 0

    def __len__(self) -> int:
        return len(self.ids)


class SeededRandom:
    """Random choices determined by the given integers: `SeededRandom(seed, source, position)`."""

    def __init__(self, seed: int, *indices: int) -> None:
        key = ",".join(str(int(index)) for index in (seed, *indices)).encode()
        digest = hashlib.blake2b(key, digest_size=16).digest()
        self._random = random.Random(int.from_bytes(digest, "big"))
        self.uniform: Callable[[], float] = self._random.random
        self.randint: Callable[[int, int], int] = self._random.randint  # both ends included
        self.shuffle = self._random.shuffle

    def choice(self, items: Sequence[T]) -> T:
        """An item, each with the same probability."""
        return items[self._random.randrange(len(items))]


@dataclass(frozen=True)
class Segment:
    """Neighbouring texts and images, encoded together."""

    parts: Sequence[SegmentPart]
    learned: bool = True


@dataclass
class SegmentList:
    """The segments of a record; `extra` and `drop_reason` as in `TrainingSequence`."""

    segments: Sequence[Segment]
    extra: JsonObject = field(default_factory=dict)
    drop_reason: str = ""


@dataclass(frozen=True)
class DecoderOptions:
    """Options of a decoder; none by default."""


class Decoder:
    """Base of all decoders; subclasses define `_segment`."""

    name: ClassVar[str]
    learns_all: ClassVar[bool] = False  # every token is learned
    Options: ClassVar[type[DecoderOptions]] = DecoderOptions
    options: DecoderOptions  # an instance of `Options`

    def __init__(self, tokenizer: TextTokenizer, options: OptionValues) -> None:
        """Raises ConfigError: unknown option or wrong value."""
        self.options = read_settings(self.Options, options, f"decoder {self.name}")
        self.tokenizer = tokenizer
        self.vocabulary = tokenizer.vocabulary
        # Allowed numbers of codes of an image.
        self.code_counts = [self.vocabulary.tokens_per_image]

    @staticmethod
    def load_tokenizer(folder: str | Path) -> TextTokenizer:
        """The tokenizer of a folder, by its files."""
        return load_text_tokenizer(folder)

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of all options."""
        return [option.name for option in dataclasses.fields(cls.Options)]

    def decode(
        self, fields: RecordFields, rng: SeededRandom, max_length: int | None = None
    ) -> TrainingSequence:
        """The sequence of a record, truncated to `max_length`.

        Raises BadRecord: a field is missing or wrong.
        """
        # 1. Texts and images; a dropped record may have none.
        segmented = self._segment(fields, rng)
        ids: list[int] = []
        labels: list[int] = []
        if segmented.segments:
            ids, labels = self._join(segmented)

        # 2. The beginning that fits.
        return TrainingSequence(
            ids[:max_length],
            labels[:max_length],
            extra=segmented.extra,
            drop_reason=segmented.drop_reason or self._nothing_learned(segmented),
            n_truncated=len(ids) - len(ids[:max_length]),
        )

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        raise NotImplementedError

    def _nothing_learned(self, segmented: SegmentList) -> str:
        """Reason to drop a record whose only target would be `</s>`, or ""."""
        for segment in segmented.segments:
            if segment.learned and not all(map(_is_blank, segment.parts)):
                return ""
        return "there is nothing to learn"

    def _join(self, segmented: SegmentList) -> tuple[list[int], list[int]]:
        """Ids and labels of the segments between `<s>` and `</s>`."""
        eos = self.tokenizer.eos_token_id
        ids = list(self.tokenizer.start_ids)
        labels = list(ids) if self.learns_all else [IGNORE_INDEX] * len(ids)
        for segment in segmented.segments:
            segment_ids = self.encode(segment.parts)
            ids += segment_ids
            labels += segment_labels(segment, segment_ids)
        # As in the original, which pads with `<unk>`.
        if self.learns_all:
            pad = self.tokenizer.pad_token_id
            labels = [IGNORE_INDEX if label == pad else label for label in labels]
        return [*ids, eos], [*labels, eos]

    def encode(self, parts: Sequence[SegmentPart]) -> list[int]:
        """Ids of texts and images as if written as one string."""
        ids: list[int] = []
        for _, part_ids in self.encode_each(parts):
            ids += part_ids
        return ids

    def encode_each(self, parts: Sequence[SegmentPart]) -> Iterator[tuple[SegmentPart, list[int]]]:
        """Texts and images with their ids.

        White space next to an image is stripped; control words in texts become special tokens.
        """
        merged = merge_text(parts)
        for index, part in enumerate(merged):
            if not isinstance(part, str):
                yield part, self.image_ids(part)
                continue
            if not self.tokenizer.strips_at_images:
                yield part, self.tokenizer.encode(part)
                continue
            # Neighbours of a merged text are images.
            text = part.lstrip() if index else part
            is_last = index + 1 == len(merged)
            yield part, self.tokenizer.encode(text if is_last else text.rstrip())

    def image_ids(self, image: SegmentPart) -> list[int]:
        """Tokens of an image, with image start and end; `Ids` are tokens already."""
        if isinstance(image, Ids):
            return list(image)
        return [self.vocabulary.boi_id, *self.vocabulary.code_to_id(image), self.vocabulary.eoi_id]

    def as_text(self, segments: Sequence[Segment]) -> str:
        """The segments as text, images as the names of their tokens."""
        texts: list[str] = []
        for segment in segments:
            for part in segment.parts:
                if isinstance(part, str):
                    texts.append(part)
                else:
                    texts += self.tokenizer.tokens(self.image_ids(part))
        return "".join(texts)

    # ---- fields

    def require(self, fields: RecordFields, name: str, kind: type[T]) -> T:
        """A field of this type. Raises BadRecord: missing or of another type."""
        value = fields.get(name)
        if value is None:
            raise BadRecord("missing key", f"{name}: missing; decoder {self.name} needs it.")
        if not isinstance(value, kind):
            raise BadRecord(
                "wrong type", f"{name}: must be a {kind.__name__}, not {shorten(value)}."
            )
        return value

    def require_text(self, fields: RecordFields, name: str) -> str:
        """A text that is not blank."""
        value = self.require(fields, name, str)
        if not value.strip(BLANK_CAPTION):
            raise BadRecord("empty text", f"{name}: is empty.")
        return value

    def texts(self, fields: RecordFields, name: str) -> list[str]:
        """A list of texts."""
        texts: list[str] = []
        for index, value in enumerate(self.require(fields, name, list)):
            item_name = f"{name}[{index}]"
            texts.append(self.require({item_name: value}, item_name, str))
        return texts

    def choices(self, fields: RecordFields, name: str) -> list[str]:
        """A list of texts, of which one is chosen. Raises BadRecord: it is empty."""
        texts = self.texts(fields, name)
        if not texts:
            raise BadRecord("empty text", f"{name}: is an empty list.")
        return texts

    # ---- images

    def codes(self, value: object, name: str) -> Codes:
        """The codes of one image, checked against the codebook size."""
        n_codes = self.vocabulary.n_codes
        codes: Codes = self.require({name: value}, name, list)
        # Exact type: bool is an int, too.
        if any(type(code) is not int or not 0 <= code < n_codes for code in codes):
            raise BadRecord(
                "codes out of range",
                f"{name}: image codes are 0 to {n_codes - 1}, not {shorten(codes)}.",
            )
        if len(codes) not in self.code_counts:
            expected = str(self.code_counts[0])
            if len(self.code_counts) > 1:
                expected += f" to {self.code_counts[-1]}"
            raise BadRecord(
                "number of codes", f"{name}: an image has {expected} codes, not {len(codes)}."
            )
        return codes

    def image(self, fields: RecordFields, rng: SeededRandom, *, as_input: bool) -> Codes:
        """The image of `image_ids`, or one of `views` (code lists of the same image).

        Views are used for an input image, and for a target only without `image_ids`.
        """
        if fields.get("views") and (as_input or fields.get("image_ids") is None):
            return self.sample_view(fields["views"], "views", rng)
        return self.codes(fields.get("image_ids"), "image_ids")

    def sample_view(self, value: object, name: str, rng: SeededRandom) -> Codes:
        """One of several code lists of the same image."""
        views = self.require({name: value}, name, list)
        # A single view takes no random number.
        codes = rng.choice(views) if len(views) > 1 else views[0]
        return self.codes(codes, name)

    def images(self, fields: RecordFields) -> list[Codes]:
        """The images of `image_ids`: one long list of codes, or a list for each image."""
        values = self.require(fields, "image_ids", list)
        images = split_codes(values, self.vocabulary.tokens_per_image)
        return [self.codes(codes, f"image_ids[{index}]") for index, codes in enumerate(images)]


def system_segment(message: str, separator: str) -> Segment:
    """A system message, without loss, that ends with the separator of turns."""
    ending = "" if message.endswith(separator) else separator
    return Segment([message + ending], learned=False)


def segment_labels(segment: Segment, ids: list[int]) -> list[int]:
    """The labels of a segment's ids."""
    return ids if segment.learned else [IGNORE_INDEX] * len(ids)


def _is_blank(part: SegmentPart) -> bool:
    return not part.strip() if isinstance(part, str) else not part


def split_codes(codes: list[Any], size: int) -> list[Any]:
    """One list per image, from a flat list of codes or a list of lists."""
    if any(isinstance(item, list) for item in codes):
        return codes
    return [codes[start : start + size] for start in range(0, len(codes), size)]


def metadata_of(fields: RecordFields) -> RecordFields:
    """The object under `metadata`, which may be JSON text; empty if absent."""
    value = fields.get("metadata")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRecord("malformed json", f"metadata: is not JSON: {shorten(value)}.") from None
    return value if isinstance(value, Mapping) else {}
