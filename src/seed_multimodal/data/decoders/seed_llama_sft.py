"""SEED-LLaMA's instruction data: only answers and the final `</s>` have a loss.

    <s>USER: [image]question\\nASSISTANT:answer</s>           further turns start with "\\nUSER: "
    <s>[INST] [image]question [/INST]\\nanswer</s>            with `template: llama2`, the 14B's; then "\\n[INST] "

`pretrain.visual_question` and `pretrain.text_conversation` have their own markers: "USER: " question "\\nASSISTANT: ".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from seed_multimodal.data.decoders import phrases
from seed_multimodal.data.decoders.base import (
    Decoder,
    DecoderOptions,
    Part,
    SeededRandom,
    Segment,
    SegmentList,
)
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.language.prompts import TUNED_TEMPLATES, get_template
from seed_multimodal.settings import setting

Turn = tuple[Sequence[Part], Sequence[Part]]  # question and answer


def with_full_stop(answer: str) -> str:
    """The answer with a final full stop."""
    return answer if answer.endswith(".") else answer + "."


@dataclass(frozen=True)
class Prompted(DecoderOptions):
    """`template`: prompt template of the trained model; the original has Vicuna's."""

    template: str = setting("vicuna", choices=TUNED_TEMPLATES)


@dataclass(frozen=True)
class Reversible(Prompted):
    reverse_ratio: float = setting(0.0, minimum=-1, maximum=1)


class Tuned(Decoder):
    """Base of the decoders of this module."""

    Options = Prompted

    def dialogue(self, turns: Iterable[Turn]) -> SegmentList:
        """Questions in the prompt template, and answers."""
        words, segments = get_template(self.options.template), list[Segment]()
        for question, answer in turns:
            before = words.separator + words.user_prefix if segments else words.user_prefix
            segments += [
                Segment([before, *question, words.user_suffix], learned=False),
                Segment(answer),
            ]
        return SegmentList(segments)

    def numbered(self, fields: Mapping[str, Any], prefix: str, least: int) -> list[str]:
        """The texts `prefix0`, `prefix1`, …"""
        texts: list[str] = []
        while len(texts) < least or fields.get(f"{prefix}{len(texts)}") is not None:
            texts.append(self.need(fields, f"{prefix}{len(texts)}", str))
        return texts

    def exact_images(self, fields: Mapping[str, Any], count: int) -> list[list[int]]:
        """The images; their number must match the placeholders."""
        images = self.images(fields)
        if len(images) != count:
            raise BadRecord(
                "images and placeholders",
                f"image_ids: {len(images)} images, but the texts have {count}.",
            )
        return images


class QuestionAnswer(Tuned):
    """A question about an image, or a request to draw it: `image_ids` (or `views`), and `question` with `answer`, or
    `text` alone (only to draw from).

    `reverse_ratio`: share of questions; 0: always a question (as in the original), below 0: always a request.
    """

    name = "sft.qa"
    Options = Reversible

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        ask = self.options.reverse_ratio == 0 or rng.uniform() < self.options.reverse_ratio
        answered = fields.get("answer") is not None or fields.get("text") is None
        answer = self.filled(fields, "answer" if answered else "text").strip()
        if ask:
            question = self.need(fields, "question", str).strip()
            return self.dialogue(
                [([self.image(fields, rng, read=True), question], [with_full_stop(answer)])]
            )
        number = rng.randint(0, len(phrases.DRAW_REQUESTS) - 1)
        end = "?" if number >= phrases.DRAW_QUESTION else "."
        request = f"{phrases.DRAW_REQUESTS[number]} {answer.rstrip('.')}{end}"
        return self.dialogue(
            [([request], [phrases.DRAW_RESPONSES[number], self.image(fields, rng, read=False)])]
        )


class Edit(Tuned):
    """An image and an instruction, answered with a sentence and the edited image: `source_image_ids`,
    `target_image_ids`, `instruction` (or `instruction_gpt`), optional `response`."""

    name = "sft.edit"

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        instruction = self.need(
            fields, "instruction_gpt" if fields.get("instruction_gpt") else "instruction", str
        )
        response = (
            fields.get("response") or phrases.EDIT_RESPONSES[rng.randint(0, phrases.EDIT_DRAWN - 1)]
        )
        source, target = (
            self.codes(fields.get(name), name) for name in ("source_image_ids", "target_image_ids")
        )
        return self.dialogue([([source, instruction], [response, target])])


class MultiEdit(Tuned):
    """Successive edits, all answered with the same sentence: `image_ids` (one more than instructions),
    `instruction0`, `instruction1`, …"""

    name = "sft.multi_edit"

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        instructions = self.numbered(fields, "instruction", 1)
        response = phrases.EDIT_RESPONSES[rng.randint(0, phrases.EDIT_DRAWN - 1)]
        first, *images = self.exact_images(fields, len(instructions) + 1)
        return self.dialogue(
            ([*([] if place else [first]), text], [response, image])
            for place, (text, image) in enumerate(zip(instructions, images, strict=True))
        )


class Story(Tuned):
    """A sequence of images with captions: `image_ids` (one per caption), `caption0`, `caption1`, …
    `reverse_ratio`: 0: one turn per further image; else one request, answered with the rest of the story."""

    name = "sft.story"
    Options = Reversible

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        captions = [text.strip() for text in self.numbered(fields, "caption", 2)]
        by_turns = self.options.reverse_ratio == 0
        number = 0 if by_turns else rng.randint(0, len(phrases.STORY_REQUESTS) - 1)
        images = self.exact_images(fields, len(captions))
        opening: list[Part] = [captions[0], images[0]]
        pairs = list(zip(captions, images, strict=True))[1:]
        if by_turns:
            return self.dialogue(
                (
                    [*([] if place else opening), f"{caption} {phrases.NEXT_IMAGE_REQUEST}"],
                    [phrases.NEXT_IMAGE_RESPONSE, image],
                )
                for place, (caption, image) in enumerate(pairs)
            )
        rest = [part for caption, image in pairs for part in ("\n" + caption, image)]
        return self.dialogue(
            [([*opening, phrases.STORY_REQUESTS[number]], [phrases.STORY_RESPONSES[number], *rest])]
        )


class Difference(Tuned):
    """A question about two images, each introduced by a sentence before or after it (random): `image_ids`, `question`,
    `answer`."""

    name = "sft.difference"

    @dataclass(frozen=True)
    class Options(Prompted):
        reverse_ratio: float = setting(
            0.0, minimum=0, maximum=0
        )  # two images are not drawn from a text

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        question = _named(self.need(fields, "question", str).strip())
        answer = _named(self.filled(fields, "answer").strip())
        after = rng.uniform() < 0.5
        first, second = self.exact_images(fields, 2)
        content: list[Part] = [phrases.FIRST_IMAGE, first, phrases.SECOND_IMAGE, second, question]
        if after:
            content = [first, phrases.FIRST_IMAGE, second, f"{phrases.SECOND_IMAGE} {question}"]
        return self.dialogue([(content, [with_full_stop(answer)])])


def _named(text: str) -> str:
    """ "image a" → "the first image"; the original also did so inside "image and"."""
    return re.sub(
        r"image [bB]\b", "the second image", re.sub(r"image [aA]\b", "the first image", text)
    )


class Interleaved(Tuned):
    """`instruction` and `response` with images written as the names of their codes."""

    name = "sft.interleaved"

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        return self.dialogue(
            [([self.need(fields, "instruction", str)], [self.need(fields, "response", str)])]
        )


class Conversation(Tuned):
    """Questions and answers about one image: `image_ids` (or `views`), `question` ("Question: … Question: …"),
    `answer` ("Answer: … Answer: …")."""

    name, clip = "sft.conversation", False

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        texts = {name: self.need(fields, name, str) for name in ("question", "answer")}
        if phrases.NO_DIALOGUE in texts["question"]:
            return SegmentList([], drop_reason="no dialogue in it")
        questions, answers = (
            [one.strip() for one in text.split(f"{name.capitalize()}: ")[1:]]
            for name, text in texts.items()
        )
        if self.clip and len(questions) != len(answers):
            raise BadRecord(
                "turns", f"answer: has {len(answers)} answers to {len(questions)} questions."
            )
        images = self.images(fields) if self.clip else [self.image(fields, rng, read=True)]
        answers = answers if self.clip else [with_full_stop(answer) for answer in answers]
        turns = enumerate(zip(questions, answers, strict=False))
        return self.dialogue(
            ([*([] if place else images), question], [answer])
            for place, (question, answer) in turns
        )


class VideoConversation(Conversation):
    """A conversation about a clip with frames `image_ids`; as many answers as questions."""

    name, clip = "sft.video_conversation", True


class Video(Tuned):
    """A question about a clip: `image_ids` (frames in order), `question`, `answer`."""

    name = "sft.video"

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        question = self.need(fields, "question", str).strip()
        answer = self.filled(fields, "answer").replace(phrases.VIDEO_ARTEFACT, "").strip()
        return self.dialogue([([*self.images(fields), question], [with_full_stop(answer)])])


# ---- conversations stored as alternating texts


@dataclass(frozen=True)
class TurnOptions(DecoderOptions):
    """`system_message`: without loss. `sep`: between turns. `roles`: names of the roles, only in pre-training."""

    roles: tuple[str, str] = ("USER", "ASSISTANT")
    sep: str = "\n"
    system_message: str = ""


@dataclass(frozen=True)
class TunedTurnOptions(TurnOptions, Prompted):
    """Turn options with a `template`."""


class TextConversation(Decoder):
    """A conversation without images: `data`, alternating questions and answers."""

    name, tuned = "pretrain.text_conversation", False
    Options: ClassVar[type[DecoderOptions]] = TurnOptions

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        turns = self.texts(fields, "data")
        return self.alternate(turns, turns[:1], self.options.system_message)

    def alternate(self, turns: Sequence[str], first: Sequence[Part], system: str) -> SegmentList:
        """`first`: the content of the first question, including images."""
        options, sep = self.options, self.options.sep
        before, after = f"{options.roles[0]}: ", f"{sep}{options.roles[1]}: "
        if self.tuned:
            before, after = "USER: ", f"{sep}ASSISTANT:"
            if options.template != "vicuna":
                words = get_template(options.template)
                before, after, sep = words.user_prefix, words.user_suffix, words.separator
                system = system and f"{words.system_prefix}{system}{words.system_suffix}"
        segments: list[Segment] = []
        if system:
            segments.append(
                Segment([system if system.endswith(sep) else system + sep], learned=False)
            )
        for place, text in enumerate(turns):
            content = first if place == 0 else [text]
            segments.append(
                Segment([text])
                if place % 2
                else Segment([(sep if place else "") + before, *content, after], learned=False)
            )
        return SegmentList(segments, {"text": self.as_text(segments)})


class TextConversationTuned(TextConversation):
    """Text conversation with the markers of instruction tuning."""

    name, tuned = "sft.text_conversation", True
    Options = TunedTurnOptions


class VisualQuestion(TextConversation):
    """A conversation about images (`image_ids`), placed before or after the first question at random.

    Texts: `data`, or `instruction` (or `inputs`, where it is not blank) and `outputs`.
    """

    name = "pretrain.visual_question"

    def _segment(self, fields: Mapping[str, Any], rng: SeededRandom) -> SegmentList:
        images = self.images(fields)
        before = self.tuned or rng.uniform() < 0.5
        if fields.get("data") is None and fields.get("outputs") is not None:
            question = "inputs" if str(fields.get("inputs") or "").strip() else "instruction"
            turns = [self.need(fields, question, str), self.need(fields, "outputs", str)]
        else:
            turns = self.texts(fields, "data")
            if self.tuned:
                turns = [
                    with_full_stop(text.strip()) if n % 2 else text.strip()
                    for n, text in enumerate(turns)
                ]
        return self.alternate(
            turns,
            [*images, *turns[:1]] if before else [*turns[:1], *images],
            "" if self.tuned else self.options.system_message,
        )


class VisualQuestionTuned(VisualQuestion):
    """Instruction-tuning variant: images always first, answers end in a full stop, no system message."""

    name, tuned = "sft.visual_question", True
    Options = TunedTurnOptions
