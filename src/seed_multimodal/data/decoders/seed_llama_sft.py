"""SEED-LLaMA's instruction data: only answers and the final `</s>` have a loss.

    <s>USER: [image]question\\nASSISTANT:answer</s>     further turns start with "\\nUSER: "
    <s>[INST] [image]question [/INST]\\nanswer</s>      with `template: llama2`, the 14B's

`pretrain.visual_question` and `pretrain.text_conversation` have their own markers: "USER: "
question "\\nASSISTANT: ".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from seed_multimodal.data.decoders import phrases
from seed_multimodal.data.decoders.base import (
    Codes,
    Decoder,
    DecoderOptions,
    SeededRandom,
    SegmentList,
    SegmentPart,
    Turn,
    put_system_first,
)
from seed_multimodal.data.formats.conversations import ROLE_ORDER
from seed_multimodal.data.formats.record import BadRecord, JsonObject, RecordFields, shorten
from seed_multimodal.language.prompts import (
    CHAT,
    TEMPLATES,
    TUNED_TEMPLATES,
    ChatTemplate,
    PromptTemplate,
    get_template,
)
from seed_multimodal.settings import setting

QuestionAnswerParts = tuple[Sequence[SegmentPart], Sequence[SegmentPart]]


def with_full_stop(answer: str) -> str:
    """The answer with a final full stop."""
    return answer if answer.endswith(".") else answer + "."


@dataclass(frozen=True)
class TemplateOptions(DecoderOptions):
    """The prompt template of the trained model; the original has Vicuna's."""

    template: str = setting("vicuna", choices=TUNED_TEMPLATES)


@dataclass(frozen=True)
class ReversibleOptions(TemplateOptions):
    """With a share of reversed samples; 0: the original's order."""

    reverse_ratio: float = setting(0.0, minimum=-1, maximum=1)


class TunedDecoder(Decoder):
    """Base of decoders with a `template`."""

    Options: ClassVar[type[DecoderOptions]] = TemplateOptions
    options: TemplateOptions

    @cached_property
    def template(self) -> PromptTemplate:
        return get_template(self.options.template, self.tokenizer)

    def turns(
        self,
        questions_and_answers: Iterable[QuestionAnswerParts],
        opening: Sequence[SegmentPart] = (),
    ) -> SegmentList:
        """Questions in the prompt template, and answers.

        opening: what precedes the first question.
        """
        turns: list[Turn] = []
        for question, answer in questions_and_answers:
            turns += [("user", [*opening, *question]), ("assistant", answer)]
            opening = ()
        return self.dialogue(self.template, turns)

    def single_turn(
        self, question: Sequence[SegmentPart], answer: Sequence[SegmentPart]
    ) -> SegmentList:
        """One question in the prompt template, and its answer."""
        return self.turns([(question, answer)])

    def numbered_texts(self, fields: RecordFields, prefix: str, minimum: int) -> list[str]:
        """The texts `prefix0`, `prefix1`, …"""
        texts: list[str] = []
        while len(texts) < minimum or fields.get(f"{prefix}{len(texts)}") is not None:
            texts.append(self.require(fields, f"{prefix}{len(texts)}", str))
        return texts

    def exact_images(self, fields: RecordFields, count: int) -> list[Codes]:
        """The images; their number must match the placeholders."""
        images = self.images(fields)
        if len(images) != count:
            raise BadRecord(
                "images and placeholders",
                f"image_ids: {len(images)} images, but the texts have {count}.",
            )
        return images


class QuestionAnswer(TunedDecoder):
    """A question about an image, or a request to draw it.

    Fields: `image_ids` (or `views`), and `question` with `answer`, or `text` alone (only to draw).
    `reverse_ratio`: share of questions; 0: always a question (as in the original), below 0: always
    a request.
    """

    name = "sft.qa"
    Options = ReversibleOptions
    options: ReversibleOptions

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        ratio = self.options.reverse_ratio
        is_question = ratio == 0 or rng.uniform() < ratio
        has_answer = fields.get("answer") is not None or fields.get("text") is None
        answer = self.require_text(fields, "answer" if has_answer else "text").strip()
        if is_question:
            question = self.require(fields, "question", str).strip()
            image = self.image(fields, rng, as_input=True)
            return self.single_turn([image, question], [with_full_stop(answer)])

        # A request and its response share an index.
        index = rng.randint(0, len(phrases.DRAW_REQUESTS) - 1)
        end = "?" if index >= phrases.FIRST_DRAW_QUESTION else "."
        request = f"{phrases.DRAW_REQUESTS[index]} {answer.rstrip('.')}{end}"
        image = self.image(fields, rng, as_input=False)
        return self.single_turn([request], [phrases.DRAW_RESPONSES[index], image])


def sample_edit_response(rng: SeededRandom) -> str:
    """A response to an editing instruction, as the original chooses it."""
    return phrases.EDIT_RESPONSES[rng.randint(0, phrases.N_EDIT_RESPONSES - 1)]


class Edit(TunedDecoder):
    """An image and an instruction, answered with a sentence and the edited image.

    Fields: `source_image_ids`, `target_image_ids`, `instruction` (or `instruction_gpt`), optional
    `response`.
    """

    name = "sft.edit"

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        instruction_name = "instruction_gpt" if fields.get("instruction_gpt") else "instruction"
        instruction = self.require(fields, instruction_name, str)
        response = fields.get("response") or sample_edit_response(rng)
        source = self.codes(fields.get("source_image_ids"), "source_image_ids")
        target = self.codes(fields.get("target_image_ids"), "target_image_ids")
        return self.single_turn([source, instruction], [response, target])


class MultiEdit(TunedDecoder):
    """Successive edits, all answered with the same sentence.

    Fields: `image_ids` (one more than instructions), `instruction0`, `instruction1`, …
    """

    name = "sft.multi_edit"

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        instructions = self.numbered_texts(fields, "instruction", minimum=1)
        response = sample_edit_response(rng)
        source, *targets = self.exact_images(fields, len(instructions) + 1)
        turns: list[QuestionAnswerParts] = [
            ([instruction], [response, target])
            for instruction, target in zip(instructions, targets, strict=True)
        ]
        return self.turns(turns, opening=[source])


class Story(TunedDecoder):
    """A sequence of images with captions.

    Fields: `image_ids` (one per caption), `caption0`, `caption1`, …
    `reverse_ratio`: 0: one turn per further image; else one request, answered with the rest of the
    story.
    """

    name = "sft.story"
    Options = ReversibleOptions
    options: ReversibleOptions

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        captions = [text.strip() for text in self.numbered_texts(fields, "caption", minimum=2)]
        by_turns = self.options.reverse_ratio == 0
        phrase_index = 0  # of the request and its response
        if not by_turns:
            phrase_index = rng.randint(0, len(phrases.STORY_REQUESTS) - 1)
        images = self.exact_images(fields, len(captions))
        opening: list[SegmentPart] = [captions[0], images[0]]
        continuation = zip(captions[1:], images[1:], strict=True)

        # One turn per further image.
        if by_turns:
            turns: list[QuestionAnswerParts] = []
            for caption, image in continuation:
                request = f"{caption} {phrases.NEXT_IMAGE_REQUEST}"
                turns.append(([request], [phrases.NEXT_IMAGE_RESPONSE, image]))
            return self.turns(turns, opening)

        # One request, answered with the rest of the story.
        answer: list[SegmentPart] = [phrases.STORY_RESPONSES[phrase_index]]
        for caption, image in continuation:
            answer += ["\n" + caption, image]
        return self.single_turn([*opening, phrases.STORY_REQUESTS[phrase_index]], answer)


class Difference(TunedDecoder):
    """A question about two images, each introduced by a sentence before or after it (random).

    Fields: `image_ids`, `question`, `answer`.
    """

    name = "sft.difference"

    @dataclass(frozen=True)
    class Options(TemplateOptions):
        # Two images are not drawn from a text.
        reverse_ratio: float = setting(0.0, minimum=0, maximum=0)

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        question = _with_ordinals(self.require(fields, "question", str).strip())
        answer = _with_ordinals(self.require_text(fields, "answer").strip())
        introduced_after = rng.uniform() < 0.5
        # The sentences come before the images, or after them; the question is last.
        first, second = self.exact_images(fields, 2)
        content = [phrases.FIRST_IMAGE, first, phrases.SECOND_IMAGE, second, question]
        if introduced_after:
            content = [first, phrases.FIRST_IMAGE, second, f"{phrases.SECOND_IMAGE} {question}"]
        return self.single_turn(content, [with_full_stop(answer)])


def _with_ordinals(text: str) -> str:
    """Replace "image a" by "the first image"; the original did so inside "image and", too."""
    text = re.sub(r"image [aA]\b", "the first image", text)
    return re.sub(r"image [bB]\b", "the second image", text)


class Interleaved(TunedDecoder):
    """`instruction` and `response` with images as the names of their codes."""

    name = "sft.interleaved"

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        instruction = self.require(fields, "instruction", str)
        return self.single_turn([instruction], [self.require(fields, "response", str)])


class Conversation(TunedDecoder):
    """Questions and answers about one image.

    Fields: `image_ids` (or `views`), `question` ("Question: … Question: …"), `answer`
    ("Answer: … Answer: …").
    """

    name = "sft.conversation"

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        question_text = self.require(fields, "question", str)
        answer_text = self.require(fields, "answer", str)
        if phrases.NO_DIALOGUE in question_text:
            return SegmentList([], drop_reason="no dialogue in it")
        questions = _split_at(question_text, "Question: ")
        answers = self._answers(_split_at(answer_text, "Answer: "), questions)
        # The images belong to the first question.
        images = self._images(fields, rng)
        turns: list[QuestionAnswerParts] = [
            ([question], [answer]) for question, answer in zip(questions, answers, strict=False)
        ]
        return self.turns(turns, opening=images)

    def _answers(self, answers: list[str], questions: list[str]) -> list[str]:
        return [with_full_stop(answer) for answer in answers]

    def _images(self, fields: RecordFields, rng: SeededRandom) -> list[Codes]:
        return [self.image(fields, rng, as_input=True)]


def _split_at(text: str, marker: str) -> list[str]:
    """The texts that follow a marker."""
    _, *texts = text.split(marker)
    return [text.strip() for text in texts]


class VideoConversation(Conversation):
    """A conversation about a clip with frames `image_ids`; as many answers as questions."""

    name = "sft.video_conversation"

    def _answers(self, answers: list[str], questions: list[str]) -> list[str]:
        if len(questions) != len(answers):
            raise BadRecord(
                "turns", f"answer: has {len(answers)} answers to {len(questions)} questions."
            )
        return answers

    def _images(self, fields: RecordFields, rng: SeededRandom) -> list[Codes]:
        return self.images(fields)


class Video(TunedDecoder):
    """A question about a clip: `image_ids` (frames in order), `question`, `answer`."""

    name = "sft.video"

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        question = self.require(fields, "question", str).strip()
        answer = self.require_text(fields, "answer").replace(phrases.VIDEO_ARTEFACT, "").strip()
        return self.single_turn([*self.images(fields), question], [with_full_stop(answer)])


# ---- conversations stored as alternating texts


@dataclass(frozen=True)
class TurnOptions(DecoderOptions):
    roles: tuple[str, str] = ("USER", "ASSISTANT")  # only in pre-training
    sep: str = "\n"  # between turns
    system_message: str = ""  # without loss


@dataclass(frozen=True)
class TunedTurnOptions(TurnOptions, TemplateOptions):
    """Turn options with a `template`."""


class TextConversation(Decoder):
    """A conversation without images: `data`, alternating questions and answers."""

    name = "pretrain.text_conversation"
    tuned = False  # has the markers of instruction tuning
    Options: ClassVar[type[DecoderOptions]] = TurnOptions
    options: TurnOptions

    @cached_property
    def template(self) -> PromptTemplate:
        options = self.options
        separator = options.sep
        if not isinstance(options, TunedTurnOptions):
            user, assistant = options.roles
            return PromptTemplate("", f"{user}: ", f"{separator}{assistant}: ", separator)
        if options.template == "vicuna":
            return PromptTemplate("", "USER: ", f"{separator}ASSISTANT:", separator)
        return get_template(options.template, self.tokenizer)

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        turns = self.texts(fields, "data")
        return self.alternate(turns, turns[:1], self.options.system_message)

    def alternate(
        self, texts: Sequence[str], first: Sequence[SegmentPart], system: str
    ) -> SegmentList:
        """Questions and answers in the template.

        first: the content of the first question, including images.
        """
        turns: list[Turn] = [
            (ROLE_ORDER[index % 2], [text] if index else first) for index, text in enumerate(texts)
        ]
        # As in the original, a last question of pre-training keeps its marker of an answer.
        if len(turns) % 2 and not self.tuned:
            turns.append(("assistant", []))
        # A hub template decides where the system message is; else it comes first, by itself.
        if isinstance(self.template, ChatTemplate):
            result = self.dialogue(self.template, turns, system)
        else:
            result = self.dialogue(self.template, turns)
            if system:
                system = self.template.system_text(system)
            put_system_first(result, system, self.template.separator)
        result.extra = {"text": self.as_text(result.segments)}
        return result


class TextConversationTuned(TextConversation):
    """Text conversation with the markers of instruction tuning."""

    name = "sft.text_conversation"
    tuned = True
    Options = TunedTurnOptions


class VisualQuestion(TextConversation):
    """A conversation about images (`image_ids`), before or after the first question at random.

    Texts: `data`, or `instruction` (or `inputs`, where it is not blank) and `outputs`.
    """

    name = "pretrain.visual_question"

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        images = self.images(fields)
        images_first = self.tuned or rng.uniform() < 0.5
        turns = self._turns(fields)
        first: list[SegmentPart] = [*turns[:1], *images]
        if images_first:
            first = [*images, *turns[:1]]
        return self.alternate(turns, first, "" if self.tuned else self.options.system_message)

    def _turns(self, fields: RecordFields) -> list[str]:
        if fields.get("data") is None and fields.get("outputs") is not None:
            has_inputs = str(fields.get("inputs") or "").strip()
            question = self.require(fields, "inputs" if has_inputs else "instruction", str)
            return [question, self.require(fields, "outputs", str)]
        turns = self.texts(fields, "data")
        if not self.tuned:
            return turns
        stripped = [text.strip() for text in turns]
        return [with_full_stop(text) if index % 2 else text for index, text in enumerate(stripped)]


class VisualQuestionTuned(VisualQuestion):
    """Instruction-tuning variant.

    Images are always first, answers end in a full stop, there is no system message.
    """

    name = "sft.visual_question"
    tuned = True
    Options = TunedTurnOptions


# ---- any conversation (ours)


class Chat(TunedDecoder):
    """A conversation of texts and images in a prompt template, as at inference.

        <s>USER: [image]question\\nASSISTANT:answer[image]\\nUSER: question\\nASSISTANT:answer</s>

    Answers are learned, each with `</s>` as the token that follows it. Before a further turn `</s>`
    is only a label: the sequence has the separator of turns in its place, as prompts have. Control
    words in texts stay plain text, as in prompts. White space next to an image is stripped, except
    at the end of a prompt before a learned answer, as at inference.

    Fields: `messages` from `formats.conversations.with_messages`, and the `system` message.
    """

    name = "chat"
    joins_segments = True
    has_plain_texts = True
    learns_turn_ends = True

    @dataclass(frozen=True)
    class Options(TemplateOptions):
        template: str = setting("vicuna", choices=(*TEMPLATES, CHAT))

    def _segment(self, fields: RecordFields, rng: SeededRandom) -> SegmentList:
        turns = self.messages(fields, lambda part, name: self._codes(part, name, rng))
        system = fields.get("system") or ""
        return self.dialogue(self.template, turns, system, self.unlearned(fields))

    def _codes(self, part: JsonObject, name: str, rng: SeededRandom) -> Codes:
        """The codes of an image; of several views one is chosen."""
        codes = part.get("codes")
        if not codes:
            raise BadRecord(
                "not tokenised",
                f"{name}: must be text or an image with codes, not {shorten(part)}; "
                "tokenize the data first.",
            )
        views = codes if isinstance(codes[0], list) else [codes]
        return self.sample_view(views, f"{name}.codes", rng)
