"""SEED-LLaMA's instruction data: the user's turns are not learned, answers and the final `</s>` are.

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
from seed_multimodal.data.decoders.base import Decoder, DecoderOptions, Draft, Part, SeededDraws, Segment
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.language.prompts import TUNED_TEMPLATES, get_template
from seed_multimodal.settings import setting

Turn = tuple[Sequence[Part], Sequence[Part]]  # question and answer


def with_full_stop(answer: str) -> str:
    """The answer, ending in a full stop."""
    return answer if answer.endswith(".") else answer + "."


@dataclass(frozen=True)
class Prompted(DecoderOptions):
    """`template`: the words around a user's turn, those of the model that is trained; the original has Vicuna's."""

    template: str = setting("vicuna", choices=TUNED_TEMPLATES)


@dataclass(frozen=True)
class Reversible(Prompted):
    reverse_ratio: float = setting(0.0, least=-1, most=1)


class Tuned(Decoder):
    """Base of the decoders of this module."""

    Options = Prompted

    def dialogue(self, turns: Iterable[Turn]) -> Draft:
        """Questions in the words of the template, and answers."""
        words, segments = get_template(self.options.template), list[Segment]()
        for question, answer in turns:
            before = words.separator + words.user_prefix if segments else words.user_prefix
            segments += [Segment([before, *question, words.user_suffix], learned=False), Segment(answer)]
        return Draft(segments)

    def numbered(self, fields: Mapping[str, Any], prefix: str, least: int) -> list[str]:
        """The texts `prefix0`, `prefix1`, …, as many as there are."""
        texts: list[str] = []
        while len(texts) < least or fields.get(f"{prefix}{len(texts)}") is not None:
            texts.append(self.need(fields, f"{prefix}{len(texts)}", str))
        return texts

    def exact_images(self, fields: Mapping[str, Any], count: int) -> list[list[int]]:
        """As many images as the texts mention."""
        images = self.images(fields)
        if len(images) != count:
            raise BadRecord("images and placeholders", f"image_ids: {len(images)} images, but the texts have {count}.")
        return images


class QuestionAnswer(Tuned):
    """A question about an image, or a request to draw it: `image_ids` (or `views`), and `question` with `answer`, or
    `text` alone (only to draw from).

    `reverse_ratio`: share of questions; 0 means always a question (as in the original), below 0 always a request.
    """

    name = "sft.qa"
    Options = Reversible

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        ask = self.options.reverse_ratio == 0 or draws.uniform() < self.options.reverse_ratio
        answered = fields.get("answer") is not None or fields.get("text") is None
        answer = self.filled(fields, "answer" if answered else "text").strip()
        if ask:
            question = self.need(fields, "question", str).strip()
            return self.dialogue([([self.image(fields, draws, read=True), question], [with_full_stop(answer)])])
        number = draws.randint(0, len(phrases.DRAW_REQUESTS) - 1)
        end = "?" if number >= phrases.DRAW_QUESTION else "."
        request = f"{phrases.DRAW_REQUESTS[number]} {answer.rstrip('.')}{end}"
        return self.dialogue([([request], [phrases.DRAW_RESPONSES[number], self.image(fields, draws, read=False)])])


class Edit(Tuned):
    """An image and what to change, answered with a sentence and the changed image: `source_image_ids`,
    `target_image_ids`, `instruction` (or `instruction_gpt`), optional `response`."""

    name = "sft.edit"

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        instruction = self.need(fields, "instruction_gpt" if fields.get("instruction_gpt") else "instruction", str)
        response = fields.get("response") or phrases.EDIT_RESPONSES[draws.randint(0, phrases.EDIT_DRAWN - 1)]
        source, target = (self.codes(fields.get(name), name) for name in ("source_image_ids", "target_image_ids"))
        return self.dialogue([([source, instruction], [response, target])])


class MultiEdit(Tuned):
    """One change after the other, all answered with the same sentence: `image_ids` (one more than instructions),
    `instruction0`, `instruction1`, …"""

    name = "sft.multi_edit"

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        instructions = self.numbered(fields, "instruction", 1)
        response = phrases.EDIT_RESPONSES[draws.randint(0, phrases.EDIT_DRAWN - 1)]
        first, *images = self.exact_images(fields, len(instructions) + 1)
        return self.dialogue(([*([] if place else [first]), text], [response, image])
                             for place, (text, image) in enumerate(zip(instructions, images, strict=True)))


class Story(Tuned):
    """Images with captions that follow each other: `image_ids` (one per caption), `caption0`, `caption1`, …
    `reverse_ratio`: 0: a turn for every further image; anything else: one request, and the rest as the answer."""

    name = "sft.story"
    Options = Reversible

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        captions = [text.strip() for text in self.numbered(fields, "caption", 2)]
        by_turns = self.options.reverse_ratio == 0
        number = 0 if by_turns else draws.randint(0, len(phrases.STORY_REQUESTS) - 1)
        images = self.exact_images(fields, len(captions))
        opening: list[Part] = [captions[0], images[0]]
        pairs = list(zip(captions, images, strict=True))[1:]
        if by_turns:
            return self.dialogue(([*([] if place else opening), f"{caption} {phrases.NEXT_IMAGE_REQUEST}"],
                                  [phrases.NEXT_IMAGE_RESPONSE, image]) for place, (caption, image) in enumerate(pairs))
        rest = [part for caption, image in pairs for part in ("\n" + caption, image)]
        return self.dialogue([([*opening, phrases.STORY_REQUESTS[number]], [phrases.STORY_RESPONSES[number], *rest])])


class Difference(Tuned):
    """A question about two images, named by a sentence before or after each (at random): `image_ids`, `question`,
    `answer`."""

    name = "sft.difference"

    @dataclass(frozen=True)
    class Options(Prompted):
        reverse_ratio: float = setting(0.0, least=0, most=0)  # two images are not drawn from a text

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        question = _named(self.need(fields, "question", str).strip())
        answer = _named(self.filled(fields, "answer").strip())
        after = draws.uniform() < 0.5
        first, second = self.exact_images(fields, 2)
        content: list[Part] = [phrases.FIRST_IMAGE, first, phrases.SECOND_IMAGE, second, question]
        if after:
            content = [first, phrases.FIRST_IMAGE, second, f"{phrases.SECOND_IMAGE} {question}"]
        return self.dialogue([(content, [with_full_stop(answer)])])


def _named(text: str) -> str:
    """"image a" → "the first image"; the original also did so inside "image and"."""
    return re.sub(r"image [bB]\b", "the second image", re.sub(r"image [aA]\b", "the first image", text))


class Interleaved(Tuned):
    """`instruction` and `response` in which images are written out by the names of their codes."""

    name = "sft.interleaved"

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        return self.dialogue([([self.need(fields, "instruction", str)], [self.need(fields, "response", str)])])


class Conversation(Tuned):
    """Questions and answers about one image: `image_ids` (or `views`), `question` ("Question: … Question: …"),
    `answer` ("Answer: … Answer: …")."""

    name, clip = "sft.conversation", False

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        texts = {name: self.need(fields, name, str) for name in ("question", "answer")}
        if phrases.NO_DIALOGUE in texts["question"]:
            return Draft([], dropped="there is no dialogue in it")
        questions, answers = ([one.strip() for one in text.split(f"{name.capitalize()}: ")[1:]]
                              for name, text in texts.items())
        if self.clip and len(questions) != len(answers):
            raise BadRecord("turns", f"answer: holds {len(answers)} answers to {len(questions)} questions.")
        images = self.images(fields) if self.clip else [self.image(fields, draws, read=True)]
        answers = answers if self.clip else [with_full_stop(answer) for answer in answers]
        turns = enumerate(zip(questions, answers, strict=False))
        return self.dialogue(([*([] if place else images), question], [answer]) for place, (question, answer) in turns)


class VideoConversation(Conversation):
    """The same about a clip, whose frames are `image_ids`, with as many answers as questions."""

    name, clip = "sft.video_conversation", True


class Video(Tuned):
    """A question about a clip: `image_ids` (frames one after the other), `question`, `answer`."""

    name = "sft.video"

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        question = self.need(fields, "question", str).strip()
        answer = self.filled(fields, "answer").replace(phrases.VIDEO_ARTEFACT, "").strip()
        return self.dialogue([([*self.images(fields), question], [with_full_stop(answer)])])


# ---- conversations stored as alternating texts


@dataclass(frozen=True)
class TurnOptions(DecoderOptions):
    """`system_message`: before everything, not learned. `sep`: between turns. `roles`: their names, of the pre-training
    module alone."""

    roles: tuple[str, str] = ("USER", "ASSISTANT")
    sep: str = "\n"
    system_message: str = ""


@dataclass(frozen=True)
class TunedTurnOptions(TurnOptions, Prompted):
    """With a `template`."""


class TextConversation(Decoder):
    """A conversation without images: `data`, question and answer in turn."""

    name, tuned = "pretrain.text_conversation", False
    Options: ClassVar[type[DecoderOptions]] = TurnOptions

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        turns = self.texts(fields, "data")
        return self.alternate(turns, turns[:1], self.options.system_message)

    def alternate(self, turns: Sequence[str], first: Sequence[Part], system: str) -> Draft:
        """`first`: the whole content of the first question, images included."""
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
            segments.append(Segment([system if system.endswith(sep) else system + sep], learned=False))
        for place, text in enumerate(turns):
            content = first if place == 0 else [text]
            segments.append(Segment([text]) if place % 2 else
                            Segment([(sep if place else "") + before, *content, after], learned=False))
        return Draft(segments, {"text": self.as_text(segments)})


class TextConversationTuned(TextConversation):
    """The same with the markers of instruction tuning."""

    name, tuned = "sft.text_conversation", True
    Options = TunedTurnOptions


class VisualQuestion(TextConversation):
    """A conversation about images (`image_ids`), which stand before or after the first question at random.

    Texts: `data`, or `instruction` (or `inputs`, where it is not blank) and `outputs`.
    """

    name = "pretrain.visual_question"

    def _draft(self, fields: Mapping[str, Any], draws: SeededDraws) -> Draft:
        images = self.images(fields)
        before = self.tuned or draws.uniform() < 0.5
        if fields.get("data") is None and fields.get("outputs") is not None:
            question = "inputs" if str(fields.get("inputs") or "").strip() else "instruction"
            turns = [self.need(fields, question, str), self.need(fields, "outputs", str)]
        else:
            turns = self.texts(fields, "data")
            if self.tuned:
                turns = [with_full_stop(text.strip()) if n % 2 else text.strip() for n, text in enumerate(turns)]
        return self.alternate(turns, [*images, *turns[:1]] if before else [*turns[:1], *images],
                              "" if self.tuned else self.options.system_message)


class VisualQuestionTuned(VisualQuestion):
    """The same in instruction tuning: images always first, answers end in a full stop, no system message."""

    name, tuned = "sft.visual_question", True
    Options = TunedTurnOptions
