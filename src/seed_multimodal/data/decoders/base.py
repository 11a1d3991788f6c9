"""Records → training sequences: the sequence, seeded random draws, checked fields, segments joined into ids and labels.

A decoder turns a record's fields into segments of text and images; `Decoder.join` makes ids and labels of them exactly
as the original data code did: each segment is encoded on its own; `<s>` and segments with `learned=False` have the
label -100. Decoders with `whole` learn every token but `<unk>`, which the original takes for padding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from seed_multimodal.data.formats.record import BadRecord, shorten
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import merge_text
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.settings import read_settings, setting

IGNORED = -100  # label of a token that is not learned
BLANK_CAPTION = " \t\r\n;,[]{}'\".?:"  # a caption of these characters alone is blank
T = TypeVar("T")
Part = str | Sequence[int]  # text, or the codes of one image


@dataclass
class TokenSequence:
    """Token ids and as many labels. `extra`: what the original returns with them (`text`, `image_id`); `dropped`: why
    the sample is left out, else empty."""

    ids: list[int]
    labels: list[int]
    extra: dict[str, Any] = field(default_factory=dict)
    dropped: str = ""

    def __len__(self) -> int:
        return len(self.ids)


class Draws(Protocol):
    """Where a decoder's random choices come from."""

    def uniform(self) -> float:
        """A number in [0, 1)."""

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""

    def randint(self, low: int, high: int) -> int:
        """An integer, both ends included."""

    def shuffle(self, items: MutableSequence[Any]) -> None:
        """Reorder the items in place."""


class SeededDraws:
    """Draws that are a function of the given integers alone: `SeededDraws(seed, source, position)`."""

    def __init__(self, seed: int, *numbers: int) -> None:
        key = ",".join(str(int(number)) for number in (seed, *numbers)).encode()
        self._random = random.Random(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "big"))
        self.uniform, self.randint, self.shuffle = self._random.random, self._random.randint, self._random.shuffle

    def choice(self, items: Sequence[T]) -> T:
        """One of the items, all equally likely."""
        return items[self._random.randrange(len(items))]


@dataclass(frozen=True)
class Segment:
    """Neighbouring texts and images, encoded together."""

    parts: Sequence[Any]
    learned: bool = True


@dataclass
class Draft:
    """The segments of a record; `extra` and `dropped` as of the sequence."""

    segments: Sequence[Segment]
    extra: dict[str, Any] = field(default_factory=dict)
    dropped: str = ""


@dataclass(frozen=True)
class DecoderOptions:
    """Options of all decoders. `code_noise`: in images that the model reads, a share of codes drawn from
    [0, code_noise] is replaced by those of another image, `noise_source(draws)`."""

    code_noise: float = setting(0.0, least=0, most=1)
    noise_source: Any = None


class Decoder:
    """Base of all decoders: `decode(fields, draws)` → `TokenSequence`."""

    name: ClassVar[str]
    whole: ClassVar[bool] = False  # every token is learned
    Options: ClassVar[type[DecoderOptions]] = DecoderOptions
    Words: ClassVar[type[MultimodalTokenizer]] = MultimodalTokenizer

    def __init__(self, tokenizer: MultimodalTokenizer, options: Mapping[str, Any]) -> None:
        """Raises `ConfigError`: an unknown option, or a wrong value."""
        self.options: Any = read_settings(self.Options, options, f"decoder {self.name}")
        self.tokenizer, self.vocabulary = tokenizer, tokenizer.vocabulary

    @classmethod
    def option_names(cls) -> list[str]:
        """The names of all options."""
        return [option.name for option in dataclasses.fields(cls.Options)]

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """The record's segments."""
        raise NotImplementedError

    def decode(self, fields: Mapping[str, Any], draws: Draws, max_length: int | None = None) -> TokenSequence:
        """The sequence of a record, cut on the right at `max_length`; where `dropped` is set, it is left out.

        Raises:
            BadRecord: a field is missing or wrong; the sentence starts with its name.
        """
        draft = self.draft(fields, draws)
        if not draft.dropped:
            draft.dropped = self.nothing_learned(draft)
        ids, labels = self.join(draft) if draft.segments else ([], [])
        return TokenSequence(ids[:max_length], labels[:max_length], draft.extra, draft.dropped)

    def nothing_learned(self, draft: Draft) -> str:
        """Why a record is dropped of which only `</s>` would be learned; "": it is not."""
        learned = [part for segment in draft.segments if segment.learned for part in segment.parts]
        blank = all(not part.strip() if isinstance(part, str) else not part for part in learned)
        return "there is nothing to learn" if blank else ""

    def join(self, draft: Draft) -> tuple[list[int], list[int]]:
        """Ids and labels of the segments between `<s>` and `</s>`."""
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        ids, labels = [bos], [bos if self.whole else IGNORED]
        for segment in draft.segments:
            piece = self.encode(segment.parts)
            ids += piece
            labels += piece if segment.learned else [IGNORED] * len(piece)
        if self.whole:
            labels = [IGNORED if label == self.tokenizer.pad_id else label for label in labels]
        return [*ids, eos], [*labels, eos]

    def encode(self, parts: Sequence[Part]) -> list[int]:
        """Ids of texts and images as if written out as one string: white space next to an image goes, and names of
        control words in the text become control words."""
        merged = merge_text(parts)
        ids: list[int] = []
        for place, part in enumerate(merged):
            if isinstance(part, str):
                part = part.lstrip() if place else part
                ids += self.tokenizer.encode(part.rstrip() if place + 1 < len(merged) else part)
            else:
                ids += [self.vocabulary.boi_id, *self.vocabulary.code_to_id(part), self.vocabulary.eoi_id]
        return ids

    def as_text(self, segments: Sequence[Segment]) -> str:
        """The segments written out, images by the names of their codes."""
        parts = [part for segment in segments for part in segment.parts]
        return "".join(part if isinstance(part, str) else self.vocabulary.image_text(part) for part in parts)

    # ---- fields

    def need(self, fields: Mapping[str, Any], name: str, kind: type[T]) -> T:
        """A field of this type. Raises `BadRecord`: the record lacks it, or it is of another type."""
        value = fields.get(name)
        if value is None:
            raise BadRecord("missing key", f"{name}: is missing; decoder {self.name} needs it.")
        if not isinstance(value, kind):
            raise BadRecord("wrong type", f"{name}: must be a {kind.__name__}, not {shorten(value)}.")
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
        return [self.need({f"{name}[{place}]": value}, f"{name}[{place}]", str) for place, value in enumerate(values)]

    # ---- images

    @property
    def code_counts(self) -> range:
        """How many codes an image may have."""
        count = self.vocabulary.tokens_per_image
        return range(count, count + 1)

    def codes(self, value: Any, name: str) -> list[int]:
        """The codes of one image, all within the codebook, since others would be other words."""
        size, counts = self.vocabulary.n_codes, self.code_counts
        codes: list[int] = self.need({name: value}, name, list)
        if any(type(code) is not int or not 0 <= code < size for code in codes):
            raise BadRecord("codes out of range", f"{name}: image codes are 0 to {size - 1}, not {shorten(codes)}.")
        if len(codes) not in counts:
            wanted = counts[0] if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            raise BadRecord("number of codes", f"{name}: an image has {wanted} codes, not {len(codes)}.")
        return codes

    def image(self, fields: Mapping[str, Any], draws: Draws, *, read: bool, name: str = "image_ids") -> list[int]:
        """The image of a field. One that the model reads is drawn from `views` (code lists of the same image) where the
        record has some, and may be given noise; one that it writes is drawn from them only without `image_ids`."""
        if name == "image_ids" and fields.get("views") and (read or fields.get(name) is None):
            return self.one_view(fields["views"], "views", draws, read=read)
        return self.one_view([self.need(fields, name, list)], name, draws, read=read)

    def one_view(self, views: Sequence[Any], name: str, draws: Draws, *, read: bool) -> list[int]:
        """One of several code lists of the same image."""
        codes = self.codes(draws.choice(views) if len(views) > 1 else views[0], name)
        return self.add_code_noise(codes, draws) if read else codes

    def images(self, fields: Mapping[str, Any], draws: Draws, *, read: bool) -> list[list[int]]:
        """Several images: one long list of codes, or a list for each image."""
        value = self.need(fields, "image_ids", list)
        if not any(isinstance(item, list) for item in value):
            size = self.vocabulary.tokens_per_image
            value = [value[start:start + size] for start in range(0, len(value), size)]
        found = [self.codes(codes, f"image_ids[{place}]") for place, codes in enumerate(value)]
        return [self.add_code_noise(codes, draws) for codes in found] if read else found

    def add_code_noise(self, codes: list[int], draws: Draws) -> list[int]:
        """A share of the codes, uniform in [0, code_noise], taken from another image."""
        if not self.options.code_noise:
            return codes
        if self.options.noise_source is None:
            raise ConfigError(f"decoder {self.name}: code_noise needs a noise_source.")
        level = self.options.code_noise * draws.uniform()
        wrong = [draws.uniform() < level for _ in codes]
        return [o if w else c for c, o, w in zip(codes, self.options.noise_source(draws), wrong, strict=False)]


def some_picture(fields: Any, draws: Draws, tokens_per_image: int) -> list[int] | None:
    """The codes of one of a record's images, at random; None where it has none. For a `noise_source`."""
    found = [codes[start:start + tokens_per_image] for codes in _code_lists(fields)
             for start in range(0, len(codes) - tokens_per_image + 1, tokens_per_image)]
    return draws.choice(found) if len(found) > 1 else found[0] if found else None


def _code_lists(value: Any) -> list[list[int]]:
    """The lists of integers anywhere in a value."""
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        return [value]
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [codes for one in inside for codes in _code_lists(one)]
