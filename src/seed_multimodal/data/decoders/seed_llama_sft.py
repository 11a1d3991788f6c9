"""SEED-LLaMA's instruction data: the user's turns are not learned, answers and the final `</s>` are.

    <s>USER: [image]question\\nASSISTANT:answer</s>           further turns start with "\\nUSER: "
    <s>[INST] [image]question [/INST]\\nanswer</s>            with `template: llama2`, the 14B's; then "\\n[INST] "

Each turn is encoded on its own. `pretrain.visual_question` and `pretrain.text_conversation`, of the pre-training
module, have their own markers: "USER: " question "\\nASSISTANT: ".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seed_multimodal.data.decoders import phrases
from seed_multimodal.data.decoders.base import Decoder, DecoderOptions, Draft, Draws, Part, Segment
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.language.prompts import TUNED_TEMPLATES, get_template
from seed_multimodal.settings import setting


def with_full_stop(answer: str) -> str:
    """The answer, ending in a full stop."""
    return answer if answer.endswith(".") else answer + "."


def numbered(fields: Mapping[str, Any], prefix: str) -> list[str]:
    """The names `prefix0`, `prefix1`, … that the record has."""
    names: list[str] = []
    while fields.get(f"{prefix}{len(names)}") is not None:
        names.append(f"{prefix}{len(names)}")
    return names


@dataclass(frozen=True)
class Prompted(DecoderOptions):
    """`template`: the words around a user's turn, those of the model that is trained; the original has Vicuna's."""

    template: str = setting("vicuna", choices=TUNED_TEMPLATES)


@dataclass(frozen=True)
class Reversible(Prompted):
    """Options of decoders that have two directions."""

    reverse_ratio: float = setting(0.0, least=-1, most=1)


class Tuned(Decoder):
    """Base of the decoders of this module."""

    Options = Prompted

    def user(self, *content: Part, first: bool) -> Segment:
        """A user's turn, up to where the answer begins."""
        words = get_template(self.options.template)
        before = words.user_prefix if first else words.separator + words.user_prefix
        return Segment([before, *content, words.user_suffix], learned=False)

    def exact_images(self, fields: Mapping[str, Any], draws: Draws, count: int, *, read: bool) -> list[list[int]]:
        """As many images as the texts mention."""
        images = self.images(fields, draws, read=read)
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

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        ask = self.options.reverse_ratio == 0 or draws.uniform() < self.options.reverse_ratio
        answered = fields.get("answer") is not None or fields.get("text") is None
        answer = self.filled(fields, "answer" if answered else "text").strip()
        if ask:
            question = self.need(fields, "question", str).strip()
            image = self.image(fields, draws, read=True)
            return Draft([self.user(image, question, first=True), Segment([with_full_stop(answer)])])
        number = draws.randint(0, len(phrases.DRAW_REQUESTS) - 1)
        end = "?" if number >= phrases.DRAW_QUESTION else "."
        request = f"{phrases.DRAW_REQUESTS[number]} {answer.rstrip('.')}{end}"
        image = self.image(fields, draws, read=False)
        return Draft([self.user(request, first=True), Segment([phrases.DRAW_RESPONSES[number], image])])


class Edit(Tuned):
    """An image and what to change, answered with a sentence and the changed image: `source_image_ids`,
    `target_image_ids`, `instruction` (or `instruction_gpt`), optional `response`."""

    name = "sft.edit"

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        instruction = self.need(fields, "instruction_gpt" if fields.get("instruction_gpt") else "instruction", str)
        response = fields.get("response") or phrases.EDIT_RESPONSES[draws.randint(0, phrases.EDIT_DRAWN - 1)]
        source = self.image(fields, draws, read=True, name="source_image_ids")
        target = self.image(fields, draws, read=False, name="target_image_ids")
        return Draft([self.user(source, instruction, first=True), Segment([response, target])])


class MultiEdit(Tuned):
    """One change after the other, all answered with the same sentence: `image_ids` (one more than instructions),
    `instruction0`, `instruction1`, …"""

    name = "sft.multi_edit"

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        self.need(fields, "instruction0", str)
        names = numbered(fields, "instruction")
        response = phrases.EDIT_RESPONSES[draws.randint(0, phrases.EDIT_DRAWN - 1)]
        images = self.exact_images(fields, draws, len(names) + 1, read=False)
        segments: list[Segment] = []
        for place, name in enumerate(names):
            seen = [self.add_code_noise(images[0], draws)] if place == 0 else []
            segments += [self.user(*seen, self.need(fields, name, str), first=place == 0),
                         Segment([response, images[place + 1]])]
        return Draft(segments)


class Story(Tuned):
    """Images with captions that follow each other: `image_ids` (one per caption), `caption0`, `caption1`, …

    `reverse_ratio`: 0: a turn for every further image; anything else: one request, and the rest as the answer.
    """

    name = "sft.story"
    Options = Reversible

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        names = ["caption0", "caption1", *numbered(fields, "caption")[2:]]
        captions = [self.need(fields, name, str).strip() for name in names]
        number = 0 if self.options.reverse_ratio == 0 else draws.randint(0, len(phrases.STORY_REQUESTS) - 1)
        images = self.exact_images(fields, draws, len(captions), read=False)
        opening: list[Part] = [captions[0], self.add_code_noise(images[0], draws)]
        pairs = list(zip(captions, images, strict=True))[1:]
        if self.options.reverse_ratio != 0:
            rest = [part for caption, image in pairs for part in ("\n" + caption, image)]
            return Draft([self.user(*opening, phrases.STORY_REQUESTS[number], first=True),
                          Segment([phrases.STORY_RESPONSES[number], *rest])])
        segments: list[Segment] = []
        for place, (caption, image) in enumerate(pairs):
            before = opening if place == 0 else []
            segments += [self.user(*before, f"{caption} {phrases.NEXT_IMAGE_REQUEST}", first=place == 0),
                         Segment([phrases.NEXT_IMAGE_RESPONSE, image])]
        return Draft(segments)


class Difference(Tuned):
    """A question about two images, named by a sentence before or after each (at random): `image_ids`, `question`,
    `answer`."""

    name = "sft.difference"

    @dataclass(frozen=True)
    class Options(Prompted):
        reverse_ratio: float = setting(0.0, least=0, most=0)  # two images are not drawn from a text

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        question = _named(self.need(fields, "question", str).strip())
        answer = _named(self.filled(fields, "answer").strip())
        after = draws.uniform() < 0.5
        first, second = self.exact_images(fields, draws, 2, read=True)
        content: list[Part] = [phrases.FIRST_IMAGE, first, phrases.SECOND_IMAGE, second, question]
        if after:
            content = [first, phrases.FIRST_IMAGE, second, f"{phrases.SECOND_IMAGE} {question}"]
        return Draft([self.user(*content, first=True), Segment([with_full_stop(answer)])])


def _named(text: str) -> str:
    """"image a" → "the first image"; the original also did so inside "image and"."""
    return re.sub(r"image [bB]\b", "the second image", re.sub(r"image [aA]\b", "the first image", text))


class Interleaved(Tuned):
    """`instruction` and `response` in which images are written out by the names of their codes."""

    name = "sft.interleaved"

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        return Draft([self.user(self.need(fields, "instruction", str), first=True),
                      Segment([self.need(fields, "response", str)])])


class Conversation(Tuned):
    """Questions and answers about one image: `image_ids` (or `views`), `question` ("Question: … Question: …"),
    `answer` ("Answer: … Answer: …")."""

    name = "sft.conversation"

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        questions = [text.strip() for text in self.need(fields, "question", str).split("Question: ")[1:]]
        answers = [text.strip() for text in self.need(fields, "answer", str).split("Answer: ")[1:]]
        if phrases.NO_DIALOGUE in fields["question"]:
            return Draft([], dropped="there is no dialogue in it")
        images, answers = self._opening(fields, draws, questions, answers)
        segments: list[Segment] = []
        for place, (question, answer) in enumerate(zip(questions, answers, strict=False)):
            segments += [self.user(*(images if place == 0 else []), question, first=place == 0), Segment([answer])]
        return Draft(segments)

    def _opening(self, fields: Mapping[str, Any], draws: Draws, questions: Sequence[str], answers: Sequence[str]
                 ) -> tuple[list[list[int]], list[str]]:
        """Images of the first question, and the answers as they are learned."""
        return [self.image(fields, draws, read=True)], [with_full_stop(answer) for answer in answers]


class VideoConversation(Conversation):
    """The same about a clip, whose frames are `image_ids`, with as many answers as questions."""

    name = "sft.video_conversation"

    def _opening(self, fields: Mapping[str, Any], draws: Draws, questions: Sequence[str], answers: Sequence[str]
                 ) -> tuple[list[list[int]], list[str]]:
        if len(questions) != len(answers):
            raise BadRecord("turns", f"answer: holds {len(answers)} answers to {len(questions)} questions.")
        return self.images(fields, draws, read=True), list(answers)


class Video(Tuned):
    """A question about a clip: `image_ids` (frames one after the other), `question`, `answer`."""

    name = "sft.video"

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        frames = self.images(fields, draws, read=True)
        question = self.need(fields, "question", str).strip()
        answer = self.filled(fields, "answer").replace(phrases.VIDEO_ARTEFACT, "").strip()
        return Draft([self.user(*frames, question, first=True), Segment([with_full_stop(answer)])])


# ---- conversations stored as alternating texts


class _Turns(Decoder):
    """`data`: question and answer in turn. Options: `system_message`, before everything, not learned; `sep` between
    turns; `roles`: the two names (of the pre-training module)."""

    @dataclass(frozen=True)
    class Options(DecoderOptions):
        roles: tuple[str, str] = ("USER", "ASSISTANT")
        sep: str = "\n"
        system_message: str = ""

    def _draft(self, turns: Sequence[str], first: Sequence[Part]) -> Draft:
        """`first`: the whole content of the first question, images included."""
        options, sep = self.options, self.options.sep
        system = "" if self.name == "sft.visual_question" else options.system_message
        before, after = f"{options.roles[0]}: ", f"{sep}{options.roles[1]}: "
        if self.name.startswith("sft."):  # which ignores the names of the roles, as in the original
            before, after = "USER: ", f"{sep}ASSISTANT:"
        if getattr(options, "template", "vicuna") != "vicuna":
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


class TextConversation(_Turns):
    """A conversation without images (`data`)."""

    name = "pretrain.text_conversation"

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        turns = self.texts(fields, "data")
        return self._draft(turns, turns[:1])


class TextConversationTuned(TextConversation):
    """The same with the markers of instruction tuning."""

    name = "sft.text_conversation"

    @dataclass(frozen=True)
    class Options(_Turns.Options, Prompted):
        """Both."""


class VisualQuestion(_Turns):
    """A conversation about images (`image_ids`), which stand before or after the first question at random.

    Texts: `data`, or `instruction` (or `inputs`, where it is not blank) and `outputs`.
    """

    name = "pretrain.visual_question"

    def draft(self, fields: Mapping[str, Any], draws: Draws) -> Draft:
        """See `Decoder`."""
        self.need(fields, "image_ids", list)
        before = self._before(draws)
        if fields.get("data") is None and fields.get("outputs") is not None:
            question = "inputs" if str(fields.get("inputs") or "").strip() else "instruction"
            turns = [self.need(fields, question, str), self.need(fields, "outputs", str)]
        else:
            turns = self._edited(self.texts(fields, "data"))
        images = self.images(fields, draws, read=True)
        return self._draft(turns, [*images, *turns[:1]] if before else [*turns[:1], *images])

    def _before(self, draws: Draws) -> bool:
        return draws.uniform() < 0.5

    def _edited(self, turns: list[str]) -> list[str]:
        return turns


class VisualQuestionTuned(VisualQuestion):
    """The same in instruction tuning: images always first, answers end in a full stop, no system message."""

    name = "sft.visual_question"

    @dataclass(frozen=True)
    class Options(_Turns.Options, Prompted):
        """Both."""

    def _before(self, draws: Draws) -> bool:
        return True

    def _edited(self, turns: list[str]) -> list[str]:
        return [with_full_stop(text.strip()) if place % 2 else text.strip() for place, text in enumerate(turns)]
