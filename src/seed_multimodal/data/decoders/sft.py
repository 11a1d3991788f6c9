"""Decoders of the instruction-tuning data: the user's turns are not learned, answers and the final `</s>` are.

    <s>USER: [picture]question\\nASSISTANT:answer</s>        further turns start with "\\nUSER: "
    <s>[INST] [picture]question [/INST]\\nanswer</s>          with `template: llama2`, the 14B's; then "\\n[INST] "

Each turn is tokenised on its own. Sentences that the data does not bring are in `phrases`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from seed_multimodal.data.decoders import phrases
from seed_multimodal.data.decoders.base import PICTURE, PICTURES, TEXT, Decoder, Draft, Part, Span
from seed_multimodal.data.decoders.sequence import Draws
from seed_multimodal.data.decoders.turns import Prompted, with_full_stop
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import get_template
from seed_multimodal.settings import setting

NO_DIALOGUE = "there is no dialogue in it"


def numbered(fields: Mapping[str, Any], prefix: str) -> list[str]:
    """The names `prefix0`, `prefix1`, … that the record has."""
    names: list[str] = []
    while fields.get(f"{prefix}{len(names)}") is not None:
        names.append(f"{prefix}{len(names)}")
    return names


@dataclass(frozen=True)
class Reversible(Prompted):
    """Options of decoders that have two directions."""

    reverse_ratio: float = setting(0.0, least=-1, most=1)


class Tuned(Decoder):
    """Base of the decoders of this module."""

    Options = Prompted
    without_effect: ClassVar[Sequence[str]] = ("reverse_ratio", "caption_prompt")

    def user(self, *said: Part, first: bool) -> Span:
        """A user's turn, up to where the answer begins."""
        words = get_template(self.options.template)
        return Span([("" if first else words.separator) + words.user_prefix, *said, words.user_suffix], learned=False)

    def answer(self, fields: Mapping[str, Any], name: str) -> str:
        """A text to learn; validation refuses an empty one, of which only a full stop would be learned."""
        said = self.text(fields, name).strip()
        if self.validate and not said:
            raise BadRecord("empty text", f"{name}: is empty.")
        return said

    def exact_pictures(self, pictures: Sequence[Any], wanted: int, what: str) -> None:
        """Refuse another number of pictures than the texts mention."""
        if len(pictures) < wanted or (self.validate and len(pictures) != wanted):
            raise BadRecord("images and placeholders",
                            f"image_ids: holds {len(pictures)} pictures, but {what} mention {wanted}.")


class QuestionAnswer(Tuned):
    """A question about a picture, or a request to draw it.

    Fields: `image_ids` (or `views`), and `question` + `answer`, or `text` alone (only to draw from).

    Options:
        reverse_ratio: share of questions; 0 means always a question (as released), below 0 always a request.
    """

    name = "sft.qa"
    needs = {"image_ids": PICTURE, "question": TEXT, "answer": TEXT}
    Options = Reversible
    without_effect = ("caption_prompt",)

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        ask = self.options.reverse_ratio == 0 or draws.uniform() < self.options.reverse_ratio
        answered = fields.get("answer") is not None or fields.get("text") is None
        said = self.answer(fields, "answer" if answered else "text")
        if ask:
            question = self.text(fields, "question").strip()
            picture = self.picture(fields, draws, read=True)
            return Draft([self.user(picture, question, first=True), Span([with_full_stop(said)])])
        number = draws.randint(0, len(phrases.DRAW_REQUESTS) - 1)
        end = "?" if number >= phrases.DRAW_QUESTION else "."
        request = f"{phrases.DRAW_REQUESTS[number]} {said.rstrip('.')}{end}"
        picture = self.picture(fields, draws, read=False)
        return Draft([self.user(request, first=True), Span([phrases.DRAW_RESPONSES[number], picture])])


class Edit(Tuned):
    """A picture and what to change, answered with a sentence and the changed picture.

    Fields: `source_image_ids`, `target_image_ids`, `instruction` (or `instruction_gpt`), optional `response`.
    """

    name = "sft.edit"
    needs = {"source_image_ids": PICTURE, "target_image_ids": PICTURE, "instruction": TEXT}

    @classmethod
    def needed(cls, fields: Mapping[str, Any]) -> Mapping[str, str]:
        """See `Decoder`: `instruction_gpt` may stand for `instruction`."""
        polite = bool(fields.get("instruction_gpt"))
        return {("instruction_gpt" if polite and name == "instruction" else name): kind
                for name, kind in cls.needs.items()}

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        for name in ("source_image_ids", "target_image_ids"):
            self.list_of(fields, name)
        instruction = self.text(fields, "instruction_gpt" if fields.get("instruction_gpt") else "instruction")
        response = fields.get("response") and self.text(fields, "response")
        response = response or phrases.EDIT_RESPONSES[draws.randint(0, phrases.EDIT_DRAWN - 1)]
        source = self.picture(fields, draws, read=True, name="source_image_ids")
        target = self.picture(fields, draws, read=False, name="target_image_ids")
        return Draft([self.user(source, instruction, first=True), Span([response, target])])


class MultiEdit(Tuned):
    """One change after the other, all answered with the same sentence.

    Fields: `image_ids` (one picture more than instructions), `instruction0`, `instruction1`, …
    """

    name = "sft.multi_edit"
    needs = {"image_ids": PICTURES, "instruction0": TEXT}

    @classmethod
    def needed(cls, fields: Mapping[str, Any]) -> Mapping[str, str]:
        """See `Decoder`: all instructions there are."""
        return {**cls.needs, **dict.fromkeys(numbered(fields, "instruction"), TEXT)}

    @classmethod
    def fits(cls, fields: Mapping[str, Any], several: bool | None) -> bool:
        """See `Decoder`: three instructions, as the released records have."""
        return not cls.missing(fields) and len(numbered(fields, "instruction")) > 2

    @classmethod
    def pictures_in(cls, fields: Mapping[str, Any]) -> int:
        """See `Decoder`."""
        return len(numbered(fields, "instruction")) + 1

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        names = numbered(fields, "instruction")
        if not names:
            raise BadRecord("missing key", f"instruction0: is missing; decoder {self.name} needs it.")
        response = phrases.EDIT_RESPONSES[draws.randint(0, phrases.EDIT_DRAWN - 1)]
        pictures = self.pictures(fields, draws, read=False)
        self.exact_pictures(pictures, len(names) + 1, f"{len(names)} instructions")
        spans: list[Span] = []
        for place, name in enumerate(names):
            seen = [self.add_code_noise(pictures[0], draws)] if place == 0 else []
            spans += [self.user(*seen, self.text(fields, name), first=place == 0),
                      Span([response, pictures[place + 1]])]
        return Draft(spans)


class Story(Tuned):
    """Pictures with captions that follow each other.

    Fields: `image_ids` (one per caption), `caption0`, `caption1`, …

    Options:
        reverse_ratio: 0: a turn for every further picture; anything else: one request, and the rest as the answer.
    """

    name = "sft.story"
    needs = {"image_ids": PICTURES, "caption0": TEXT, "caption1": TEXT}
    Options = Reversible
    without_effect = ("caption_prompt",)

    @classmethod
    def needed(cls, fields: Mapping[str, Any]) -> Mapping[str, str]:
        """See `Decoder`: all captions there are."""
        return {**cls.needs, **dict.fromkeys(numbered(fields, "caption"), TEXT)}

    @classmethod
    def fits(cls, fields: Mapping[str, Any], several: bool | None) -> bool:
        """See `Decoder`: five captions, as the released records have."""
        return not cls.missing(fields) and len(numbered(fields, "caption")) > 4

    @classmethod
    def pictures_in(cls, fields: Mapping[str, Any]) -> int:
        """See `Decoder`."""
        return len(numbered(fields, "caption"))

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        captions = [self.text(fields, name).strip() for name in numbered(fields, "caption")]
        if len(captions) < 2:
            raise BadRecord("missing key", f"caption{len(captions)}: is missing; a story has at least two captions.")
        number = 0 if self.options.reverse_ratio == 0 else draws.randint(0, len(phrases.STORY_REQUESTS) - 1)
        pictures = self.pictures(fields, draws, read=False)
        self.exact_pictures(pictures, len(captions), f"{len(captions)} captions")
        opening: list[Part] = [captions[0], self.add_code_noise(pictures[0], draws)]
        if self.options.reverse_ratio != 0:
            told = [part for place in range(1, len(captions)) for part in ("\n" + captions[place], pictures[place])]
            return Draft([self.user(*opening, phrases.STORY_REQUESTS[number], first=True),
                          Span([phrases.STORY_RESPONSES[number], *told])])
        spans: list[Span] = []
        for place in range(1, len(captions)):
            request = f"{captions[place]} {phrases.NEXT_IMAGE_REQUEST}"
            spans += [self.user(*(opening if place == 1 else []), request, first=place == 1),
                      Span([phrases.NEXT_IMAGE_RESPONSE, pictures[place]])]
        return Draft(spans)


class Difference(Tuned):
    """A question about two pictures, told apart by a sentence before or after each (at random).

    Fields: `image_ids` (two pictures), `question`, `answer`.
    """

    name = "sft.difference"
    needs = {"image_ids": PICTURES, "question": TEXT, "answer": TEXT}
    Options = Reversible
    without_effect = ("caption_prompt",)

    def __init__(self, *arguments: Any) -> None:
        """See `Decoder`. Raises ConfigError also for a reverse_ratio: there is no other direction."""
        super().__init__(*arguments)
        if self.validate and self.options.reverse_ratio != 0:
            raise ConfigError(f"decoder {self.name}: reverse_ratio must be 0; two pictures are not drawn from a text.")

    @classmethod
    def pictures_in(cls, fields: Mapping[str, Any]) -> int:
        """See `Decoder`."""
        return 2

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        if self.options.reverse_ratio != 0 and not draws.uniform() < self.options.reverse_ratio:
            raise ConfigError(f"decoder {self.name}: reverse_ratio must be 0; two pictures are not drawn from a text.")
        question = self._named(self.text(fields, "question").strip())
        answer = self._named(self.answer(fields, "answer"))
        after = draws.uniform() < 0.5
        pictures = self.pictures(fields, draws, read=True)
        self.exact_pictures(pictures, 2, "question and answer")
        first, second = pictures[:2]
        if after:
            said: list[Part] = [first, phrases.FIRST_IMAGE, second, f"{phrases.SECOND_IMAGE} {question}"]
        else:
            said = [phrases.FIRST_IMAGE, first, phrases.SECOND_IMAGE, second, question]
        return Draft([self.user(*said, first=True), Span([with_full_stop(answer)])])

    def _named(self, text: str) -> str:
        """"image a" -> "the first image"; the released code also did so inside "image and"."""
        for letters, name in zip(("aA", "bB"), ("the first image", "the second image"), strict=True):
            pattern = re.compile(rf"image [{letters}]" + (r"\b" if self.validate else ""))
            text = pattern.sub(name, text)
        return text


class Interleaved(Tuned):
    """A request and a response in which pictures are written out by the names of their codes.

    Fields: `instruction`, `response`.
    """

    name = "sft.interleaved"
    needs = {"instruction": TEXT, "response": TEXT}
    reads_pictures = False

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        said = {name: self.text(fields, name) for name in ("instruction", "response")}
        for name, value in said.items() if self.validate else ():
            self._check(value, name)
        return Draft([self.user(said["instruction"], first=True), Span([said["response"]])])

    def _check(self, value: str, name: str) -> None:
        """Every picture whole, its codes within the codebook."""
        opened = re.findall(r"<img>((?:<img_\d+>)*)</img>", value)
        if len(opened) != value.count("<img>") or len(opened) != value.count("</img>"):
            raise BadRecord("images and placeholders", f"{name}: a picture in it has no <img> or no </img>.")
        for codes in opened:
            self.codes([int(code) for code in re.findall(r"\d+", codes)], name)
