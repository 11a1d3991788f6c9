"""Record → training sequence: seeded random choices, field checks, segments joined into ids and labels.

As in the original data code, each segment of texts and images is encoded on its own; `<s>` and segments with
`learned=False` have the label -100. Decoders with `whole` learn every token except `<unk>`, the original's padding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from seed_multimodal.data.formats.record import BadRecord, shorten
from seed_multimodal.language.prompts import merge_text
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.settings import read_settings

BLANK_CAPTION = " \t\r\n;,[]{}'\".?:"  # a caption of only these characters is blank
T = TypeVar("T")
Part = str | Sequence[int]  # text, or the codes of one image


@dataclass
class TrainingSequence:
    """Token ids and labels of equal length.

    extra: further values that the original returns (`text`).
    drop_reason: why the sample is skipped, or empty.
    n_truncated: tokens removed at the end.
    """

    ids: list[int]
    labels: list[int]
    extra: dict[str, Any] = field(default_factory=dict)
    drop_reason: str = ""
    n_truncated: int = 0

    def __len__(self) -> int:
        return len(self.ids)


class SeededRandom:
    """Random choices determined by the given integers: `SeededRandom(seed, source, position)`."""

    def __init__(self, seed: int, *numbers: int) -> None:
        key = ",".join(str(int(number)) for number in (seed, *numbers)).encode()
        self._random = random.Random(
            int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "big")
        )
        self.uniform, self.randint, self.shuffle = (
            self._random.random,
            self._random.randint,
            self._random.shuffle,
        )

    def choice(self, items: Sequence[T]) -> T:
        """A uniformly drawn item."""
        return items[self._random.randrange(len(items))]


@dataclass(frozen=True)
class Segment:
    """Neighbouring texts and images, encoded together."""

    parts: Sequence[Any]
    learned: bool = True


@dataclass
class SegmentList:
    """The segments of a record; `extra` and `drop_reason` as in `TrainingSequence`."""

    segments: Sequence[Segment]
    extra: dict[str, Any] = field(default_factory=dict)
    drop_reason: str = ""


@dataclass(frozen=True)
class DecoderOptions:
    """Options of a decoder; none by default."""


class Decoder:
    """Base of all decoders; subclasses define `_segment`."""

    name: ClassVar[str]
    whole: ClassVar[bool] = False  # every token is learned
    Options: ClassVar[type[DecoderOptions]] = DecoderOptions
    Tokenizer: ClassVar[type[MultimodalTokenizer]] = MultimodalTokenizer

    def __init__(self, tokenizer: MultimodalTokenizer, options: Mapping[str, Any]) -> None:
        """Raises ConfigError: unknown option or wrong value."""
        self.options: Any = read_settings(self.Options, options, f"decoder {self.name}")
        self.tokenizer, self.vocabulary = tokenizer, tokenizer.vocabulary
        self.code_counts = [
            self.vocabulary.tokens_per_image
        ]  # allowed numbers of codes of an image

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of all options."""
        return [option.name for option in dataclasses.fields(cls.Options)]

    def decode(
        self, fields: Mapping[str, Any], rng: SeededRandom, max_length: int | None = None
    ) -> TrainingSequence:
        """The sequence of a record, truncated to `max_length`. Raises BadRecord: a field is missing or wrong."""
        segmented = self._segment(fields, rng)
        dropped = segmented.drop_reason or self._nothing_learned(segmented)
        ids, labels = self._join(segmented) if segmented.segments else ([], [])
        cut = len(ids) - len(ids[:max_length])
        return TrainingSequence(
            ids[:max_length], labels[:max_length], segmented.extra, dropped, cut
        )

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        raise NotImplementedError

    def _nothing_learned(self, segmented: SegmentList) -> str:
        """Reason to drop a record whose only target would be `</s>`, or ""."""
        learned = [
            part for segment in segmented.segments if segment.learned for part in segment.parts
        ]
        blank = all(not part.strip() if isinstance(part, str) else not part for part in learned)
        return "there is nothing to learn" if blank else ""

    def _join(self, segmented: SegmentList) -> tuple[list[int], list[int]]:
        """Ids and labels of the segments between `<s>` and `</s>`."""
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        ids, labels = [bos], [bos if self.whole else IGNORE_INDEX]
        for segment in segmented.segments:
            piece = self.encode(segment.parts)
            ids += piece
            labels += piece if segment.learned else [IGNORE_INDEX] * len(piece)
        if self.whole:
            labels = [IGNORE_INDEX if label == self.tokenizer.pad_id else label for label in labels]
        return [*ids, eos], [*labels, eos]

    def encode(self, parts: Sequence[Part]) -> list[int]:
        """Ids of texts and images as if written out as one string."""
        return [id for _, ids in self.pieces(parts) for id in ids]

    def pieces(self, parts: Sequence[Any]) -> Iterator[tuple[Any, list[int]]]:
        """Texts and images with their ids: white space next to an image is stripped, control words in texts become
        special tokens."""
        merged = merge_text(parts)
        for place, part in enumerate(merged):
            if not isinstance(part, str):
                yield part, self.image_ids(part)
                continue
            text = part.lstrip() if place else part
            yield part, self.tokenizer.encode(text.rstrip() if place + 1 < len(merged) else text)

    def image_ids(self, image: Any) -> list[int]:
        """Tokens of an image, with image start and end."""
        return [self.vocabulary.boi_id, *self.vocabulary.code_to_id(image), self.vocabulary.eoi_id]

    def as_text(self, segments: Sequence[Segment]) -> str:
        """The segments as text, images as the names of their tokens."""
        parts = [part for segment in segments for part in segment.parts]
        return "".join(
            part if isinstance(part, str) else "".join(self.tokenizer.tokens(self.image_ids(part)))
            for part in parts
        )

    # ---- fields

    def need(self, fields: Mapping[str, Any], name: str, kind: type[T]) -> T:
        """A field of this type. Raises BadRecord: missing or of another type."""
        value = fields.get(name)
        if value is None:
            raise BadRecord("missing key", f"{name}: missing; decoder {self.name} needs it.")
        if not isinstance(value, kind):
            raise BadRecord(
                "wrong type", f"{name}: must be a {kind.__name__}, not {shorten(value)}."
            )
        return value

    def filled(self, fields: Mapping[str, Any], name: str) -> str:
        """A text that is not blank."""
        value = self.need(fields, name, str)
        if not value.strip(BLANK_CAPTION):
            raise BadRecord("empty text", f"{name}: is empty.")
        return value

    def texts(self, fields: Mapping[str, Any], name: str) -> list[str]:
        """A list of texts."""
        values = self.need(fields, name, list)
        return [
            self.need({f"{name}[{place}]": value}, f"{name}[{place}]", str)
            for place, value in enumerate(values)
        ]

    def choices(self, fields: Mapping[str, Any], name: str) -> list[str]:
        """A list of texts, of which one is drawn. Raises BadRecord: it is empty."""
        texts = self.texts(fields, name)
        if not texts:
            raise BadRecord("empty text", f"{name}: is an empty list.")
        return texts

    # ---- images

    def codes(self, value: Any, name: str) -> list[int]:
        """The codes of one image, checked against the codebook size."""
        size = self.vocabulary.n_codes
        codes: list[int] = self.need({name: value}, name, list)
        if any(type(code) is not int or not 0 <= code < size for code in codes):
            raise BadRecord(
                "codes out of range",
                f"{name}: image codes are 0 to {size - 1}, not {shorten(codes)}.",
            )
        if len(codes) not in self.code_counts:
            wanted = " to ".join(map(str, sorted({self.code_counts[0], self.code_counts[-1]})))
            raise BadRecord(
                "number of codes", f"{name}: an image has {wanted} codes, not {len(codes)}."
            )
        return codes

    def image(self, fields: Mapping[str, Any], rng: SeededRandom, *, read: bool) -> list[int]:
        """The image of `image_ids`. An input image is drawn from `views` (code lists of the same image) if the record
        has some; a target image only without `image_ids`."""
        if fields.get("views") and (read or fields.get("image_ids") is None):
            return self.one_view(fields["views"], "views", rng)
        return self.codes(fields.get("image_ids"), "image_ids")

    def one_view(self, views: Any, name: str, rng: SeededRandom) -> list[int]:
        """One of several code lists of the same image."""
        views = self.need({name: views}, name, list)
        return self.codes(rng.choice(views) if len(views) > 1 else views[0], name)

    def images(self, fields: Mapping[str, Any]) -> list[list[int]]:
        """The images of `image_ids`: one long list of codes, or a list for each image."""
        codes = split_codes(self.need(fields, "image_ids", list), self.vocabulary.tokens_per_image)
        return [self.codes(one, f"image_ids[{place}]") for place, one in enumerate(codes)]


def split_codes(codes: list[Any], size: int) -> list[Any]:
    """One list per image, from a flat list of codes or a list of lists."""
    if any(isinstance(item, list) for item in codes):
        return codes
    return [codes[start : start + size] for start in range(0, len(codes), size)]


def metadata_of(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object under `metadata`, which may be JSON text; empty if absent."""
    value = fields.get("metadata")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRecord("malformed json", f"metadata: is not JSON: {shorten(value)}.") from None
    return value if isinstance(value, Mapping) else {}
