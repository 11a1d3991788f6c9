"""`AnswerGenerator`: conversations ─► prompts ─► answers, before their images are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any

from seed_multimodal.errors import ConfigError, GenerationError, RequestError
from seed_multimodal.inference.base_engine import BaseEngine, Likelihood
from seed_multimodal.inference.prompt import GenerationSettings, Prompt
from seed_multimodal.inference.sampling import read_answer
from seed_multimodal.language.answer import Answer, AnswerReader, ImagePart, left_out_note
from seed_multimodal.language.known_words import read_known_words
from seed_multimodal.language.messages import Message, speaks_of_missing_image, without_oldest_turn
from seed_multimodal.language.prompts import TaskPrompts
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.pipelines.family import Family, Task
from seed_multimodal.pipelines.images import ImageCodec, Log
from seed_multimodal.progress import Progress
from seed_multimodal.settings import check_value, nearest

# A request: messages of which a family builds a prompt, or a prompt that was built before.
ConversationOrPrompt = Sequence[Message] | Prompt

BATCH = 16  # requests whose prompts are built together
BAR_FROM = 32  # number of requests from which a progress bar is shown


@dataclass
class GeneratedAnswer:
    """An answer before image decoding.

    image_inputs: codes, or features `[N, W]`, of each complete image.
    """

    answer: Answer
    image_inputs: Sequence[Any]
    prompt: Prompt

    def single_image(self) -> Any:
        """The input of the only image. Raises GenerationError: none, or several."""
        if len(self.image_inputs) != 1:
            problems = self.answer.problems
            reason = f": {problems[0]}" if problems else "."
            raise GenerationError(f"The model's answer has no complete image{reason}")
        return self.image_inputs[0]


def _of_family(name: str) -> Any:
    """A property that reads an attribute of the system's family."""
    return property(attrgetter(f"family.{name}"))


class AnswerGenerator:
    """Answers of a family's language model by an engine."""

    engine: BaseEngine
    # The family's parts, which the engine and the prompts use, too: assigning to them is an error.
    config: Any = _of_family("config")
    tokenizer: TextTokenizer = _of_family("tokenizer")
    tasks: TaskPrompts = _of_family("tasks")  # the sentences of its requests
    images: ImageCodec = _of_family("images")
    llm: Any = _of_family("llm")  # the language model; None: the engine has it, outside of torch

    def __init__(self, family: Family, log: Log) -> None:
        self.family = family
        self.log = log

    # ---- settings

    def settings(self, task: str = "chat", **options: Any) -> GenerationSettings:
        """The defaults of a task, overridden by `options`; `stop` is added to the task's.

        A temperature, top_p or top_k enables sampling (without beams), unless `do_sample` is set.
        A forced image raises `max_new_tokens`, unless the caller sets it; it is all of a drawing.
        Raises ConfigError: an unknown option (with the nearest); several answers; a limit below a
        forced image.
        """
        # 1. Names.
        names = [entry.name for entry in fields(GenerationSettings)]
        drawing_names = self.images.drawing_settings
        for name in options:
            if name in drawing_names:
                raise ConfigError(f"The option {name!r} is of drawing, but nothing is drawn.")
            if name not in names:
                suggestion = nearest(name, [*names, *drawing_names])
                raise ConfigError(f"Unknown option {name!r}{suggestion}.")

        # 2. Values: later mappings override earlier ones.
        if "do_sample" not in options and {"temperature", "top_p", "top_k"} & options.keys():
            options = {"do_sample": True, "num_beams": 1, **options}
        if isinstance(options.get("stop"), str):
            options["stop"] = (options["stop"],)
        family_values = self.family.settings(task)
        values = {
            "max_new_tokens": 256,
            "do_sample": False,
            **self.family.defaults.get(task, {}),
            **family_values,
            **options,
        }
        settings: GenerationSettings = check_value(GenerationSettings, values, "Generation setting")
        if settings.num_return_sequences > 1:
            raise ConfigError(
                "num_return_sequences: each request gets one answer; for several, repeat the "
                "request with other seeds (draw and edit: num_images)."
            )
        stop = settings.stop
        if "stop" in options:
            stop = (*family_values["stop"], *stop)

        # 3. Tokens of a forced image: its codes and `</img>`.
        limit = settings.max_new_tokens
        if settings.images == "forced":
            vocabulary = self.tokenizer.vocabulary
            needed = vocabulary.min_codes + 1
            if "max_new_tokens" in options and limit < needed:
                raise ConfigError(
                    f"An image needs {needed} new tokens, but max_new_tokens is {limit}."
                )
            limit = max(limit, needed)
            if task in ("draw", "edit"):
                limit = min(limit, vocabulary.tokens_per_image + 1)
        return replace(settings, stop=stop, max_new_tokens=limit)

    # ---- prompts

    def unknown_words_note(self, *messages: Message, drawing: bool = False) -> str:
        """A note about words that the system did not learn, or empty.

        drawing: words count that it can say, but not draw.
        """
        file = self.config.known_words
        if file is None:
            return ""
        text = "\n".join(message.text for message in messages)
        return read_known_words(file).note(text, drawing)

    def _log_note(self, note: str) -> None:
        if self.log and note:
            self.log(note)

    def _log_image_notes(self, answers: Sequence[GeneratedAnswer]) -> None:
        """Log the notes of requests: unknown images, what the system cannot do."""
        for index, generated in enumerate(answers):
            note = generated.answer.note
            if note:
                self._log_note(note if len(answers) == 1 else f"Request {index}: {note}")

    def _fitting_prompt(
        self, conversation: list[Message], task: Task, opening: str, settings: GenerationSettings
    ) -> Prompt:
        """The prompt of a conversation; the oldest turns are dropped to fit the context.

        opening: text with which the answer begins.
        """
        context = self.engine.capacity
        # Tokens for the answer: a quarter of the context, and at least an image.
        reserved = max(context // 4, self.tokenizer.vocabulary.min_codes + 2)
        reserved = min(settings.max_new_tokens, reserved)

        answered = self.tokenizer.encode_parts([opening])
        turns = conversation
        while True:
            (prompt,) = self.family.prompts([turns], task, [settings.seed])
            prompt = prompt.answered_with(answered)
            shorter = without_oldest_turn(turns)
            if len(prompt) + reserved <= context or len(shorter) == len(turns):
                break
            turns = shorter

        notes = []
        n_dropped = len(conversation) - len(turns)
        if n_dropped:
            notes.append(left_out_note(n_dropped, f"{context} tokens"))
        draws = settings.images == "forced"
        if not draws and speaks_of_missing_image(conversation):
            notes.append("The message speaks of a picture, but the conversation has none.")
        notes.append(self.unknown_words_note(turns[-1], drawing=draws))
        notes.append(prompt.note)
        prompt.note = " ".join(filter(None, notes))
        return prompt

    # ---- answers

    def generate_answers(
        self,
        requests: Sequence[ConversationOrPrompt],
        task: Task,
        settings: GenerationSettings | Sequence[GenerationSettings],
        opening: str = "",
        *,
        batch_size: int = BATCH,
    ) -> list[GeneratedAnswer]:
        """Answers before image decoding.

        requests: all conversations, or all prompts.
        settings: of all requests, or of each. opening: text with which the answers begin.
        batch_size: so many prompts are built at once.
        """
        check_value(int, batch_size, "batch_size", minimum=1)
        count = len(requests)
        if isinstance(settings, GenerationSettings):
            settings = [settings] * count
        answered = self.tokenizer.encode_parts([opening]) if opening else ()
        answers: list[GeneratedAnswer] = []
        bar = Progress(task, count, "answer", log=self.log) if count >= BAR_FROM else None
        with bar or nullcontext():
            for start in range(0, count, batch_size):
                # 1. The prompts of a batch.
                prompts: Any = requests[start : start + batch_size]
                batch_settings = settings[start : start + batch_size]
                if not isinstance(prompts[0], Prompt):
                    seeds = [row.seed for row in batch_settings]
                    prompts = self.family.prompts(prompts, task, seeds)
                if answered:
                    prompts = [prompt.answered_with(answered) for prompt in prompts]

                # 2. Their answers, and the inputs of the images in them.
                for request in self.engine.run(prompts, batch_settings):
                    answer = self._answer(request.reader, request.prompt, request.finish_reason)
                    parts = [part for part in answer.parts if isinstance(part, ImagePart)]
                    inputs = self.family.image_inputs(parts, request) if parts else ()
                    answers.append(GeneratedAnswer(answer, inputs, request.prompt))
                if bar is not None:
                    bar.update(len(prompts))
        return answers

    def read_answer(self, ids: Sequence[int], settings: GenerationSettings) -> Answer:
        """The answer of ids that were generated elsewhere (by transformers), cut at its end."""
        return self._answer(read_answer(self.tokenizer, ids, settings), Prompt(), "stop")

    def _answer(self, reader: AnswerReader, prompt: Prompt, finish_reason: str) -> Answer:
        """The answer to a prompt that a reader has read."""
        return Answer(
            tuple(reader.parts),
            tuple(reader.ids),
            prompt.note,
            self.tasks.answer_after,
            prompt_tokens=len(prompt) - len(prompt.answered),  # those are in the answer's ids
            finish_reason=finish_reason,
        )

    def generate_image_answers(
        self,
        requests: Sequence[ConversationOrPrompt],
        task: Task,
        settings: Sequence[GenerationSettings],
        limit: int | None = None,
        *,
        batch_size: int = BATCH,
    ) -> list[GeneratedAnswer]:
        """Answers with one image, before decoding, after an optional text (`TaskPrompts`).

        settings: of each request, with a forced image.
        limit: tokens of an answer with a text; None: of the image, and of a short text.
        """
        # 1. A model that announces its image answers freely first.
        answers: dict[int, GeneratedAnswer] = {}
        free_answers: list[GeneratedAnswer] = []
        text_length = self._text_tokens_before_image(task)
        if text_length:
            free: list[GenerationSettings] = []
            for forced in settings:
                row_limit = limit or forced.max_new_tokens + text_length
                free.append(replace(forced, images="auto", max_new_tokens=row_limit))
            free_answers = self.generate_answers(requests, task, free, batch_size=batch_size)
            for row, answer in enumerate(free_answers):
                if len(answer.image_inputs) == 1:
                    answers[row] = answer

        # 2. An image is forced where that gave none, or several.
        missing = [row for row in range(len(requests)) if row not in answers]
        tasks = self.tasks
        forced_answers = self.generate_answers(
            [requests[row] for row in missing],
            task,
            [settings[row] for row in missing],
            tasks.edit_response if task == "edit" else tasks.draw_response,
            batch_size=batch_size,
        )
        for row, generated in zip(missing, forced_answers, strict=True):
            # What the model answered instead of an image, such as that it cannot make an edit.
            text = free_answers[row].answer.text if free_answers else ""
            if text and not free_answers[row].image_inputs:
                note = f"{generated.answer.note} The model answered: {text!r}".strip()
                generated.answer = replace(generated.answer, note=note)
            answers[row] = generated
        return [answers[row] for row in sorted(answers)]

    def _text_tokens_before_image(self, task: Task) -> int:
        """Tokens in which the model may say what an image will show, before the image is forced."""
        tasks = self.tasks
        if task == "edit":
            return tasks.edit_words
        return tasks.draw_words if self.config.tuned else 0

    def answer_likelihoods(
        self,
        conversations: Sequence[Sequence[Message]],
        answers: Sequence[Sequence[str]],
        task: Task,
        *,
        batch_size: int = BATCH,
    ) -> list[list[Likelihood]]:
        """How likely each of the given answers to each conversation is.

        A system that generates a verdict first (`TaskPrompts.answer_after`) answers after its own.
        Raises RequestError: an empty answer, or another number of lists than of conversations.
        """
        if len(answers) != len(conversations):
            raise RequestError(
                f"{len(conversations)} requests were given with {len(answers)} lists of answers."
            )
        for row, texts in enumerate(answers):
            if not all(texts):
                raise RequestError(f"Request {row} has an empty answer.")
        settings = self.settings(task, do_sample=False, num_beams=1)
        verdict_end = self.tasks.answer_after.rstrip()
        likelihoods: list[list[Likelihood]] = []
        for start in range(0, len(conversations), batch_size):
            turns = conversations[start : start + batch_size]
            prompts = self.family.prompts(turns, task, [settings.seed] * len(turns))
            if verdict_end:
                verdicts = self.engine.generate(prompts, settings)
                for row, (prompt, ids) in enumerate(zip(prompts, verdicts, strict=True)):
                    extended = [*prompt.ids, *self._verdict_ids(ids, verdict_end)]
                    prompts[row] = Prompt(extended, prompt.images)
            continuations = [
                [self.tokenizer.encode(text) for text in texts]
                for texts in answers[start : start + batch_size]
            ]
            likelihoods += self.engine.likelihoods(prompts, continuations)
        return likelihoods

    def _verdict_ids(self, answer_ids: Sequence[int], end: str) -> Sequence[int]:
        """The tokens of an answer up to the `end` of its verdict; none without one."""
        for length in range(1, len(answer_ids) + 1):
            if end in self.tokenizer.decode(answer_ids[:length]):
                return answer_ids[:length]
        return ()
