"""Decoders of LaVIT's unified pre-training, and of what its model is tuned with.

    lavit.caption    [picture] caption</s>                      the picture is read; its caption and </s> are learned
                     caption[ codes ]                           the picture is written; codes and ] are learned
                     [ codes ]                                  the caption was dropped: the context for guidance
    lavit.question   [picture] Question: … Answer: answer</s>   answer and </s> are learned
    lavit.compose    codes instruction[ codes ]                 a picture and words to a picture; the last codes and ]

[ and ] are image start and end. A picture that is read stands there as continuous features, one that is written as
codes: either as many as the frozen selector keeps, which is known on the device only, so `image_tokens` places are
planned for it here (`training.lavit.rows` puts in what is there). Codes of a pre-tokenised record (`image_ids`) stand
in the sequence at once. There is no <s>, as at inference. Plain text: `pretrain.text`. Source: specification §3, §5.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seed_multimodal.data.decoders import phrases
from seed_multimodal.data.decoders.base import TEXT, TEXTS, Draft, Span
from seed_multimodal.data.decoders.opened import OpenedDecoder, OpenedOptions, PictureSequence, UsedPicture
from seed_multimodal.data.decoders.sequence import IGNORED, Draws, TokenSequence
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.lavit.processing import QUESTION, LavitTokenizer, LavitWords
from seed_multimodal.settings import setting

START, END = "start", "end"
_SEEDS = 2**62
Codes = list[int]


@dataclass(frozen=True)
class Bracket:
    """Image start, or the end, which is learned where a picture is written."""

    which: str


@dataclass(frozen=True)
class LavitOptions(OpenedOptions):
    """Options of these decoders.

    Args:
        image_tokens: places that packing plans for a picture; 0: three eighths of its patches (a third is what the
            released selector aims at). Rows come out longer or shorter by what is kept more or less.
    """

    image_tokens: int = setting(0, least=0)


def planned_places(options: Mapping[str, Any], patches: int) -> int:
    """Places that a source with these options plans for a picture of so many patches."""
    return min(patches, options.get("image_tokens") or -(-patches * 3 // 8))


class LavitDecoder(OpenedDecoder):
    """Base of these decoders."""

    Options = LavitOptions
    Words = LavitTokenizer
    interpolation = "bicubic"

    def __init__(self, tokenizer: MultimodalTokenizer, options: Mapping[str, Any]) -> None:
        """See `Decoder`. Raises ConfigError also for a tokenizer of another system."""
        super().__init__(tokenizer, options)
        if not isinstance(self.vocabulary, LavitWords):
            raise ConfigError(f"decoder {self.name}: the tokenizer's words are not LaVIT's.")
        self.places = planned_places(options, self.vocabulary.tokens_per_image)

    def said(self, fields: Mapping[str, Any], name: str, draws: Draws) -> str:
        """A text of the record, of a list one of them. Raises BadRecord: it is empty, or holds a placeholder."""
        value = fields.get(name)
        several = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
        found = str(draws.choice(value)) if several and isinstance(value, list) else self.text(fields, name)
        if PLACEHOLDER in found:
            raise BadRecord("images and placeholders", f"{name}: holds {found.count(PLACEHOLDER)} {PLACEHOLDER} "
                            f"placeholders, but decoder {self.name} places the pictures itself.")
        if not found.strip(phrases.BLANK_CAPTION):
            raise BadRecord("empty text", f"{name}: is empty.")
        return found.strip()

    def seen(self, fields: Mapping[str, Any], name: str, draws: Draws, written: bool) -> UsedPicture:
        """The opened picture of a field; which of its patches are kept is drawn by a seed of its own."""
        self.check_picture(fields.get(name), name)
        return UsedPicture(fields[name], None, written, draws.randint(0, _SEEDS))

    def drawn(self, fields: Mapping[str, Any], name: str, draws: Draws) -> UsedPicture | Codes:
        """A picture as codes: those of the record under `NAME_ids`, else to be made from the picture."""
        ids = f"{name}_ids"
        return self.codes(fields[ids], ids) if fields.get(ids) is not None else self.seen(fields, name, draws, True)

    def wrong_number(self, codes: int) -> str:
        most = self.vocabulary.tokens_per_image
        return "" if 1 <= codes <= most else f"holds {codes} codes; a picture has 1 to {most}."

    def written(self, picture: UsedPicture | Codes) -> list[Span]:
        """A picture that is learned: its start is given, codes and end are not."""
        return [Span([Bracket(START)], learned=False), Span([picture, Bracket(END)])]  # type: ignore[list-item]

    def _fill(self, sequence: TokenSequence, draft: Draft, max_length: int | None) -> None:
        assert isinstance(sequence, PictureSequence)
        for span in draft.spans:
            for part in span.parts:
                self._add(sequence, part, span.learned)
        if draft.end:
            sequence.ids.append(self.tokenizer.eos_id)
            sequence.labels.append(self.tokenizer.eos_id)

    def _add(self, sequence: PictureSequence, part: Any, learned: bool) -> None:
        start, words = len(sequence.ids), self.vocabulary
        if isinstance(part, UsedPicture):
            ids = [words.code_start] * self.places
            (sequence.written if part.written else sequence.read).extend(range(start, start + self.places))
            sequence.pictures.append(part)
        elif isinstance(part, Bracket):
            ids = [words.boi_id if part.which == START else words.eoi_id]
        else:
            ids = self.tokenizer.encode_parts([part]) if isinstance(part, str) else words.code_to_id(part)
        sequence.ids += ids
        sequence.labels += ids if learned else [IGNORED] * len(ids)

    def limit(self, sequence: PictureSequence, max_length: int | None) -> None:
        """As `OpenedDecoder`; one that ends in a picture is never cut."""
        if max_length is not None and len(sequence) > max_length and sequence.ids[-1] == self.vocabulary.eoi_id:
            sequence.dropped = f"the text is too long to draw from within {max_length} tokens"
            return
        super().limit(sequence, max_length)


class Caption(LavitDecoder):
    """A picture and its caption, either first.

    Fields: `text` (or a list of which one is drawn) and `image` (opened) or `image_ids` (its codes, which can be
    written only).

    Options:
        img_first_ratio: share of samples that read the picture and learn the caption.
        text_dropout: share of the others without their caption, so that the model can be guided away from drawing
            without one. Unpublished, so ours.
    """

    name = "lavit.caption"
    needs = {"image": "picture", "text": TEXTS}

    @dataclass(frozen=True)
    class Options(LavitOptions):
        img_first_ratio: float = setting(0.5, least=0, most=1)
        text_dropout: float = setting(0.1, least=0, most=1)

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        text = self.said(fields, "text", draws)
        reads = draws.uniform() < self.options.img_first_ratio
        dropped = draws.uniform() < self.options.text_dropout
        if reads and (fields.get("image") is not None or fields.get("image_ids") is None):
            picture = self.seen(fields, "image", draws, False)
            shown: list[Any] = [Bracket(START), picture, Bracket(END)]
            return Draft([Span(shown, learned=False), Span([text])], {"text": text}, image_first=True)
        before = [] if dropped else [Span([text], learned=False)]
        return Draft([*before, *self.written(self.drawn(fields, "image", draws))], {"text": text}, end=False)


class Question(LavitDecoder):
    """A picture, a question and its answer. Fields: `image` (opened), `question`, `answer`.

    Options:
        prompt: with `{}` for the question; the released one.
    """

    name = "lavit.question"
    needs = {"image": "picture", "question": TEXT, "answer": TEXT}

    @dataclass(frozen=True)
    class Options(LavitOptions):
        prompt: str = QUESTION

        def __post_init__(self) -> None:
            if "{}" not in self.prompt:
                raise ConfigError(f"prompt {self.prompt!r} has no {{}} to put the question in.")

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        asked = self.options.prompt.replace("{}", self.said(fields, "question", draws))
        answer = self.said(fields, "answer", draws)
        picture = self.seen(fields, "image", draws, False)
        shown: list[Any] = [Bracket(START), picture, Bracket(END), asked]
        return Draft([Span(shown, learned=False), Span([answer])], {"text": answer})


class Compose(LavitDecoder):
    """A picture as codes and words, made into another picture. Fields: `source_image`, `target_image` (opened), or the
    codes of each under `source_image_ids`, `target_image_ids`; `instruction`.

    Options:
        text_dropout: as of a caption; both the picture and the words are left out.
    """

    name = "lavit.compose"
    needs = {"source_image": "picture", "target_image": "picture", "instruction": TEXT}

    @dataclass(frozen=True)
    class Options(LavitOptions):
        text_dropout: float = setting(0.1, least=0, most=1)

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        text = self.said(fields, "instruction", draws)
        given: list[Any] = [self.drawn(fields, "source_image", draws), text]
        before = [] if draws.uniform() < self.options.text_dropout else [Span(given, learned=False)]
        return Draft([*before, *self.written(self.drawn(fields, "target_image", draws))], {"text": text}, end=False)
