"""Record → training sequence: seeded random choices, field checks, segments as ids and labels.

A decoder cuts a record into segments, which say what is learned; `Decoder._join` encodes them, and
is the only place that knows `<s>`, `</s>` and white space next to images. As in the original, each
segment is encoded separately.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from seed_multimodal.data.formats.conversations import NO_ANSWER, REPAIRED, not_a_conversation
from seed_multimodal.data.formats.images import missing_key_text
from seed_multimodal.data.formats.record import BadRecord, JsonObject, RecordFields, shorten
from seed_multimodal.errors import RequestError
from seed_multimodal.language.hub_tokenizer import load_text_tokenizer
from seed_multimodal.language.prompts import PromptTemplate, merge_text
from seed_multimodal.language.text_tokenizer import TextTokenizer, without_space_at_images
from seed_multimodal.language.vocabulary import IGNORE_INDEX, Ids
from seed_multimodal.settings import read_settings

BLANK_CAPTION = " \t\r\n;,[]{}'\".?:"  # a caption of only these characters is blank
T = TypeVar("T")
Codes = list[int]  # of one image
# A text, or an image in the form that the decoder's `image_ids` encodes: codes or an opened image.
SegmentPart = Any
Turn = tuple[str, Sequence[SegmentPart]]  # "user" or "assistant", and the content
OptionValues = Mapping[str, Any]  # options of a decoder, as configured


@dataclass
class TrainingSequence:
    """Token ids and labels of equal length.

    extra: further values that the original returns (`text`).
    drop_reason: why the sample is skipped, or empty.
    repaired: what was left out or joined to make the record usable, or empty.
    n_truncated: tokens removed at the end.
    position_ids: `[A, n]`, where the model's positions have axes.
    """

    ids: list[int]
    labels: list[int]
    extra: JsonObject = field(default_factory=dict)
    drop_reason: str = ""
    repaired: str = ""
    n_truncated: int = 0
    position_ids: np.ndarray | None = None

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
    """Neighbouring texts and images, encoded together.

    learned: its tokens have a loss.
    ends_turn: `</s>` is learned as what follows it, where the next turn begins.
    """

    parts: Sequence[SegmentPart]
    learned: bool = True
    ends_turn: bool = False


@dataclass
class SegmentList:
    """The segments of a record; `extra`, `drop_reason` and `repaired` as in `TrainingSequence`.

    has_end: `</s>` follows the last segment.
    """

    segments: Sequence[Segment]
    extra: JsonObject = field(default_factory=dict)
    drop_reason: str = ""
    repaired: str = ""
    has_end: bool = True


@dataclass(frozen=True)
class DecoderOptions:
    """Options of a decoder; none by default."""


class Decoder:
    """Base of all decoders; subclasses define `_segment`.

    learns_all: `<s>` is learned, but no `<unk>`, which is the original's padding.
    has_start: sequences begin with the tokenizer's start tokens.
    joins_segments: white space next to an image of a neighbouring segment is stripped, too.
    has_plain_texts: control words in texts stay text; else they become special tokens.
    can_split: long sequences may be split into several.
    learns_turn_ends: with every prompt template; else with those that end answers with a token.
    """

    name: ClassVar[str]
    learns_all = False
    has_start = True
    joins_segments = False
    has_plain_texts = False
    can_split = False
    learns_turn_ends = False
    Options: ClassVar[type[DecoderOptions]] = DecoderOptions
    Result: ClassVar[type[TrainingSequence]] = TrainingSequence
    options: DecoderOptions  # an instance of `Options`

    def __init__(self, tokenizer: TextTokenizer, options: OptionValues) -> None:
        """Raises ConfigError: unknown option or wrong value."""
        self.options = read_settings(self.Options, options, f"decoder {self.name}")
        self.tokenizer = tokenizer
        self.vocabulary = tokenizer.vocabulary

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
        sequence = self.Result(
            [],
            [],
            segmented.extra,
            segmented.drop_reason or self._nothing_learned(segmented),
            segmented.repaired or fields.get(REPAIRED, ""),
        )

        # 2. Their ids and labels, of which the beginning is used.
        for part, ids, labels in self._join(segmented) if segmented.segments else ():
            self._add(sequence, part, ids, labels)
        self._limit(sequence, max_length)
        if not sequence.drop_reason and set(sequence.labels) == {IGNORE_INDEX}:
            sequence.drop_reason = f"there is nothing to learn within {max_length} tokens"
            sequence.ids, sequence.labels = [], []
        return sequence

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        raise NotImplementedError

    def _nothing_learned(self, segmented: SegmentList) -> str:
        """Reason to drop a record whose only target would be `</s>`, or ""."""
        for segment in segmented.segments:
            if segment.learned and not all(map(_is_blank, segment.parts)):
                return ""
        return "there is nothing to learn"

    def _add(
        self, sequence: TrainingSequence, part: SegmentPart, ids: list[int], labels: list[int]
    ) -> None:
        """Append a part of the segments."""
        sequence.ids += ids
        sequence.labels += labels

    def _limit(self, sequence: TrainingSequence, max_length: int | None) -> None:
        """Truncate the sequence, or set `drop_reason`."""
        n_tokens = len(sequence)
        sequence.ids = sequence.ids[:max_length]
        sequence.labels = sequence.labels[:max_length]
        sequence.n_truncated = n_tokens - len(sequence)

    # ---- segments → ids and labels

    def _join(self, segmented: SegmentList) -> Iterator[tuple[SegmentPart, list[int], list[int]]]:
        """The texts and images of the segments, each with its ids and labels."""
        # 1. The start; a sequence of which all is learned includes it.
        eos = self.tokenizer.eos_token_id
        start = Ids(self.tokenizer.start_ids if self.has_start else ())
        learns_start = self.learns_all and segmented.segments[0].learned
        yield start, list(start), self.labels(start, list(start), learns_start)

        # 2. The segments. The first token of the next turn is in the position of `</s>`.
        answer_ended = False
        for segment, parts in self._stripped(segmented.segments):
            for part in parts:
                ids = self._part_ids(part)
                labels = self.labels(part, ids, segment.learned)
                if segment.ends_turn:
                    answer_ended = True
                elif answer_ended and ids:
                    answer_ended = False
                    labels[0] = eos
                yield part, ids, labels

        # 3. The end.
        if segmented.has_end:
            yield Ids([eos]), [eos], [eos]

    def _stripped(self, segments: Sequence[Segment]) -> Iterator[tuple[Segment, list[SegmentPart]]]:
        """The merged parts of segments, without white space next to images."""
        merged = [merge_text(segment.parts) or [""] for segment in segments]
        for index, (segment, parts) in enumerate(zip(segments, merged, strict=True)):
            before: SegmentPart = ""
            after: SegmentPart = ""
            if self.joins_segments and index:
                before = merged[index - 1][-1]
            # White space at the end of a prompt stays, as at inference.
            if self.joins_segments and index + 1 < len(merged):
                ends_prompt = segments[index + 1].learned and not segment.learned
                after = "" if ends_prompt else merged[index + 1][0]
            if self.tokenizer.strips_at_images:
                parts = without_space_at_images([before, *parts, after])[1:-1]
            yield segment, parts

    def _part_ids(self, part: SegmentPart) -> list[int]:
        """Ids of a part of a segment."""
        if isinstance(part, Ids):
            return list(part)
        if not isinstance(part, str):
            return self.image_ids(part)
        if self.has_plain_texts:
            return self.tokenizer.encode_parts([part], strip=False)
        return self.tokenizer.encode(part)

    def labels(self, part: SegmentPart, ids: list[int], learned: bool) -> list[int]:
        """The labels of a part's ids."""
        if not learned:
            return [IGNORE_INDEX] * len(ids)
        ignored = self.tokenizer.pad_token_id if self.learns_all else None
        return [IGNORE_INDEX if id == ignored else id for id in ids]

    def dialogue(
        self,
        template: PromptTemplate,
        turns: Sequence[Turn],
        system: str = "",
        unlearned: Collection[int] = (),
    ) -> SegmentList:
        """Turns of "user" and "assistant" in a prompt template; only answers are learned.

        unlearned: indices of turns that are not. A question after the last answer is left out.
        """
        n_turns = len(turns)
        while n_turns and turns[n_turns - 1][0] == "user":
            n_turns -= 1
        if not n_turns:
            return SegmentList([])
        try:
            rendered = template.render_turns(turns[:n_turns], system)
        except RequestError as error:
            raise BadRecord("refused by the chat template", str(error)) from error

        ends = bool(template.turn_marker) if self.learns_turn_ends else template.has_end_token
        answers = (index for index, (role, _) in enumerate(turns) if role == "assistant")
        segments: list[Segment] = []
        for role, parts in rendered:
            is_learned = role == "assistant" and next(answers) not in unlearned
            segments.append(Segment(parts, learned=is_learned, ends_turn=is_learned and ends))
        return SegmentList(segments, repaired=NO_ANSWER if n_turns < len(turns) else "")

    def image_ids(self, image: SegmentPart) -> list[int]:
        """Tokens of an image, with image start and end."""
        return self.vocabulary.image_ids(image)

    def split_image(self, image: SegmentPart) -> tuple[Ids, Ids]:
        """The image start, and the other tokens of an image."""
        start, *others = self.image_ids(image)
        return Ids([start]), Ids(others)

    def as_text(self, segments: Sequence[Segment]) -> str:
        """The segments as text, images as the names of their tokens."""
        texts: list[str] = []
        for segment in segments:
            for part in segment.parts:
                if isinstance(part, str):
                    texts.append(part)
                else:
                    texts += self.tokenizer.tokens(self._part_ids(part))
        return "".join(texts)

    # ---- fields

    def require(self, fields: RecordFields, name: str, kind: type[T]) -> T:
        """A field of this type. Raises BadRecord: missing or of another type."""
        value = fields.get(name)
        if value is None:
            if "image_ids" in name:
                raise BadRecord(
                    "not tokenised",
                    f"{name}: there are no codes, which decoder {self.name} reads; tokenize the "
                    "images first (extract_image_ids_to_torchdata_parallel*.py).",
                )
            problem = missing_key_text(name, fields)
            raise BadRecord("missing key", f"{problem}; decoder {self.name} needs it.")
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

    def messages(
        self, fields: RecordFields, read_image: Callable[[JsonObject, str], Any]
    ) -> list[Turn]:
        """The turns of `messages`, with `read_image(part, name)` for each image."""
        if fields.get("messages") is None:
            raise not_a_conversation(fields)
        turns: list[Turn] = []
        for turn_index, message in enumerate(self.require(fields, "messages", list)):
            parts: list[SegmentPart] = []
            for part_index, part in enumerate(message["content"]):
                if not isinstance(part, str):
                    part = read_image(part, f"messages[{turn_index}].content[{part_index}]")
                parts.append(part)
            turns.append((message["role"], parts))
        return turns

    def unlearned(self, fields: RecordFields) -> set[int]:
        """The indices of the `messages` that are not learned."""
        messages = enumerate(fields["messages"])
        return {index for index, message in messages if not message.get("learned", True)}

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
        minimum, maximum = self.vocabulary.min_codes, self.vocabulary.tokens_per_image
        if not minimum <= len(codes) <= maximum:
            expected = maximum if minimum == maximum else f"{minimum} to {maximum}"
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
        images = values
        if not any(isinstance(item, list) for item in values):
            size = self.vocabulary.tokens_per_image
            images = [values[start : start + size] for start in range(0, len(values), size)]
        return [self.codes(codes, f"image_ids[{index}]") for index, codes in enumerate(images)]


def put_system_first(turns: SegmentList, message: str, separator: str) -> None:
    """Put a system message before turns, if there are both: without loss, and ending with their
    separator."""
    if message and turns.segments:
        ending = "" if message.endswith(separator) else separator
        turns.segments = [Segment([message + ending], learned=False), *turns.segments]


def _is_blank(part: SegmentPart) -> bool:
    return not part.strip() if isinstance(part, str) else not part


def metadata_of(fields: RecordFields) -> RecordFields:
    """The object under `metadata`, which may be JSON text; empty if absent."""
    value = fields.get("metadata")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRecord("malformed json", f"metadata: is not JSON: {shorten(value)}.") from None
    return value if isinstance(value, Mapping) else {}
