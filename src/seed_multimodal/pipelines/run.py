"""`TaskRunner.run`: tasks ─► prompts ─► answers ─► images ─► events, the one path to an answer.

    for task, event in system.run(tasks): ...

Events (see `language.answer`) of a task end with `done`. Tasks run together: their images are drawn
when all their answers are there. A live one is alone: its texts, previews and images come while it
is generated.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from PIL import Image

from seed_multimodal.errors import GenerationError, RequestError
from seed_multimodal.inference.base_engine import BaseEngine, GeneratedSequence, Likelihood
from seed_multimodal.inference.prompt import GenerationSettings, Prompt, Stopped
from seed_multimodal.inference.sampling import read_answer
from seed_multimodal.language.answer import Answer, Event, ImagePart, PrefacePart, left_out_note
from seed_multimodal.language.messages import (
    Message,
    newest_turns,
    speaks_of_missing_image,
    user_message,
    without_oldest_rounds,
)
from seed_multimodal.language.prompts import TaskPrompts
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.pipelines.family import Family
from seed_multimodal.pipelines.images import ImageCodec, ImageInput, Log
from seed_multimodal.pipelines.tasks import DRAWING_KINDS, Notes, Task, TaskKind
from seed_multimodal.pipelines.world import DESCRIPTION, NOTE
from seed_multimodal.progress import Progress
from seed_multimodal.settings import check_value

BATCH = 16  # tasks whose prompts are built together
BAR_FROM = 32  # number of tasks from which a progress bar is shown


@dataclass
class GeneratedAnswer:
    """An answer to a task before its images are drawn.

    inputs: codes, or features `[N, W]`, of each complete image.
    """

    task: Task
    prompt: Prompt
    answer: Answer
    inputs: Sequence[ImageInput]

    def single_image(self) -> Any:
        """The input of the only image. Raises GenerationError: none, or several."""
        if len(self.inputs) != 1:
            problems = self.answer.problems
            reason = f": {problems[0]}" if problems else "."
            raise GenerationError(f"The model's answer has no complete image{reason}")
        return self.inputs[0]


@dataclass
class Undrawn:
    """A complete image of an answer.

    parts: of the answer so far. answer: if it is complete.
    """

    task: Task
    prompt: Prompt
    part: ImagePart
    input: Any  # of the codec's `draw`
    parts: Sequence[object]
    answer: Answer | None = None


def _of_family(name: str) -> Any:
    """A property that reads an attribute of the system's family."""
    return property(attrgetter(f"family.{name}"))


class TaskRunner:
    """Answers tasks by a family's language model and an engine: base of `MultimodalSystem`."""

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

    def settings(self, task: str = "chat", **options: Any) -> GenerationSettings:
        """The settings of a task's tokens, see `Family.generation_settings`."""
        return self.family.generation_settings(task, options)

    def image_task(
        self,
        kind: TaskKind,
        request: Sequence[Message] | Prompt,
        generation: GenerationSettings,
        limit: int | None = None,
    ) -> Task:
        """A task that is answered with one image, after an optional text (`TaskPrompts`).

        generation: with a forced image. limit: tokens of an answer with a text; None: of the image,
        and of a short text.
        """
        tasks = self.tasks
        opening = tasks.edit_response if kind == "edit" else tasks.draw_response
        task = Task(kind, request, generation, opening)
        n_tokens = self.family.tokens_before_image(kind)
        if n_tokens:
            limit = limit or generation.max_new_tokens + n_tokens
            task.first = replace(generation, images="auto", max_new_tokens=limit)
        return task

    def run(
        self, tasks: Sequence[Task], *, live: bool = False, batch_size: int = BATCH
    ) -> Iterator[tuple[Task, Event]]:
        """Events of tasks of one kind, with their tasks. Drawings have one image each.

        Raises as `generate`; GenerationError: a drawing without an image.
        """
        if live:
            (task,) = tasks
            yield from self._run_live(task)
            return
        n_images = 0
        for answers in self.generate(tasks, batch_size=batch_size):
            images: list[Undrawn] = []
            for item in answers:
                task, answer = item.task, item.answer
                if task.kind in DRAWING_KINDS:
                    item.single_image()
                if task.drawing is None:
                    continue
                parts = [part for part in answer.parts if isinstance(part, ImagePart)]
                for part, image_input in zip(parts, item.inputs, strict=True):
                    images.append(
                        Undrawn(task, item.prompt, part, image_input, answer.parts, answer)
                    )
            for task, event in self._drawn(images, n_images) if images else ():
                yield task, event
                n_images += event["type"] == "image"
            for item in answers:
                yield item.task, _done(item.task, item.answer)

    def generate(
        self, tasks: Sequence[Task], *, batch_size: int = BATCH
    ) -> Iterator[list[GeneratedAnswer]]:
        """The answers to tasks of one kind, batch by batch, before their images are drawn.

        batch_size: so many prompts are built at once. Raises as the engine's `run`.
        """
        check_value(int, batch_size, "batch_size", minimum=1)
        count = len(tasks)
        bar = Progress(tasks[0].kind, count, "answer", log=self.log) if count >= BAR_FROM else None
        with bar or nullcontext():
            for start in range(0, count, batch_size):
                batch = tasks[start : start + batch_size]
                prompts = self._prompts(batch)
                opened = [
                    prompt.answered_with(self.tokenizer.encode_parts([task.opening]))
                    for task, prompt in zip(batch, prompts, strict=True)
                ]

                # 1. The answers; a model that announces its images answers freely first.
                first = [task.first for task in batch if task.first]
                settings = first or [task.generation for task in batch]
                requests = self.engine.run(prompts if first else opened, settings)
                answers = list(map(self._read, batch, requests))

                # 2. An image is forced where a free answer has none, or several.
                missing = [row for row, item in enumerate(answers) if len(item.inputs) != 1]
                missing = missing if first else []
                forced_prompts = [opened[row] for row in missing]
                forced_settings = [batch[row].generation for row in missing]
                forced = self.engine.run(forced_prompts, forced_settings)
                for row, request in zip(missing, forced, strict=True):
                    refusal = answers[row].answer.text
                    if refusal and not answers[row].inputs:
                        batch[row].notes.add(f"The model answered: {refusal!r}")
                    answers[row] = self._read(batch[row], request)
                if bar is not None:
                    bar.update(len(batch))
                yield answers

    def _read(self, task: Task, request: GeneratedSequence) -> GeneratedAnswer:
        """The answer of a request that has ended."""
        reader = request.reader
        answer = Answer(
            tuple(reader.parts),
            tuple(reader.ids),
            # The others are in the answer's ids.
            prompt_tokens=len(request.prompt) - len(request.prompt.answered),
            finish_reason=request.finish_reason,
        )
        parts = [part for part in answer.parts if isinstance(part, ImagePart)]
        inputs = self.family.image_inputs(parts, request) if parts else ()
        return GeneratedAnswer(task, request.prompt, answer, inputs)

    def read_answer(self, ids: Sequence[int], settings: GenerationSettings) -> Answer:
        """The answer of ids that were generated elsewhere (by transformers), cut at its end."""
        settings = replace(settings, answer_after=self.tasks.answer_after)
        reader = read_answer(self.tokenizer, ids, settings)
        return Answer(tuple(reader.parts), tuple(reader.ids))

    # ---- prompts

    def _prompts(self, tasks: Sequence[Task]) -> list[Prompt]:
        """The prompt of each task of a batch, all of conversations or all built before."""
        built = [task.request for task in tasks if isinstance(task.request, Prompt)]
        if built:
            return built
        conversations: list[Any] = [task.request for task in tasks]
        seeds = [task.generation.seed for task in tasks]
        notes = [task.notes for task in tasks]
        first = tasks[0]
        settings = first.drawing.settings if first.drawing else None
        prompts = self.family.prompts(conversations, first.kind, seeds, notes, settings)
        for task, prompt in zip(tasks, prompts, strict=True):
            if task.negative:
                prompt.negative = self.family.negative_ids(task.negative)
        return prompts

    def _fitting_prompt(self, task: Task) -> Prompt:
        """The prompt of a conversation, without its oldest rounds where they do not fit.

        Raises Stopped: the caller's `should_stop` is true.
        """
        # 1. Tokens for the answer: a quarter of the context, and at least an image.
        context = self.engine.capacity
        reserved = max(context // 4, self.tokenizer.vocabulary.min_codes + 2)
        reserved = min(task.generation.max_new_tokens, reserved)
        request: Any = task.request
        # Rounds that cannot fit are not read: each message and image has a token.
        draws = task.generation.images == "forced"
        notes = Notes()
        conversation = newest_turns(request, context, context, self.family.max_characters)
        conversation = self.family.read_words(conversation, notes, draws)
        should_stop = task.generation.should_stop
        opening = self.tokenizer.encode_parts([task.opening])

        @functools.cache
        def prompt_without(n_rounds: int) -> Prompt:
            # A short conversation that is late gets the beginning of an answer.
            if n_rounds and should_stop and should_stop():
                raise Stopped
            turns = without_oldest_rounds(conversation, n_rounds)
            (prompt,) = self._prompts([replace(task, request=turns, notes=notes)])
            return prompt.answered_with(opening)

        def fits(n_rounds: int) -> bool:
            return len(prompt_without(n_rounds)) + reserved <= context

        # 2. As few rounds less as possible, by bisection; the last one stays.
        last = sum(message.role == "user" for message in conversation) - 1
        n_rounds = 0
        if not fits(n_rounds):
            n_rounds = min(bisect_left(range(last), True, 1, key=fits), last)

        # 3. What the user should know.
        n_messages = len(request) - len(without_oldest_rounds(conversation, n_rounds))
        if n_messages:
            task.notes.add(left_out_note(n_messages, f"{context} tokens"))
        if not draws and speaks_of_missing_image(conversation):
            task.notes.add("The message speaks of a picture, but the conversation has none.")
        task.notes.add(*notes)
        task.notes.preface = notes.preface
        return prompt_without(n_rounds)

    # ---- a live answer

    def _run_live(self, task: Task) -> Iterator[tuple[Task, Event]]:
        """The events of one answer while it is generated."""
        # 1. Beams have no unfinished images: their tokens come at the end.
        drawing = task.drawing
        previews = drawing.previews if drawing and task.generation.num_beams == 1 else ()
        prompt = self._fitting_prompt(task)
        request = self.engine.submit(prompt, task.generation, previews)

        # 2. Its texts and images.
        events = _until_stopped(request)
        preface = task.notes.preface
        try:
            for event in events:
                if event["type"] == "text":
                    event["text"] = preface + event["text"]
                    preface = ""
                if event["type"] == "image_preview":
                    codes = event["codes"]
                    event["image"] = self._previews(task, [codes], [task.generation.seed or 0])[0]
                elif event["type"] == "image":
                    part = event["part"]
                    event["image"] = None
                    if drawing is not None:
                        (image_input,) = self.family.image_inputs([part], request)
                        parts = request.reader.parts
                        yield from self._drawn([Undrawn(task, prompt, part, image_input, parts)])
                        continue
                yield task, event
        except Stopped:  # before the drawing of an image
            pass

        # 3. What the answer lacks.
        answer = self._read(task, request).answer
        n_tokens = len(answer.ids)
        vocabulary = self.tokenizer.vocabulary
        needed = vocabulary.image_length if self.config.abilities.converses else 0
        is_cut = answer.finish_reason == "length" and n_tokens < needed
        if is_cut and task.generation.images != "never" and not answer.reasoning:
            task.notes.add(
                f"The answer was cut off after {n_tokens} tokens; an image needs {needed}."
            )
        task.notes.add(*self.family.boxes(answer)[1])
        yield task, _done(task, answer)

    # ---- images

    def _drawn(
        self, images: Sequence[Undrawn], first_index: int = 0
    ) -> Iterator[tuple[Task, Event]]:
        """Previews of all images of complete answers, then the images, which are described and
        compared if asked for.

        first_index: of the images in all of the run.
        """
        # 1. Each image with each seed of its task.
        rows: list[Undrawn] = []
        seeds: list[int] = []
        for image in images:
            assert image.task.drawing is not None
            for seed in image.task.drawing.seeds:
                rows.append(image)
                seeds.append(seed)
        drawing = rows[0].task.drawing
        assert drawing is not None

        # 2. The previews.
        for length in drawing.previews if rows[0].answer else ():  # others were shown
            first_codes = [list(row.input[:length]) for row in rows]
            previews = self._previews(rows[0].task, first_codes, seeds)
            shown = zip(rows, first_codes, previews, strict=True)
            for index, (row, codes, preview) in enumerate(shown, first_index):
                event: Event = {"type": "image_preview", "codes": codes, "image": preview}
                yield row.task, {**event, "index": index}

        # 3. The images.
        inputs = [row.input for row in rows]
        prompts = [row.prompt for row in rows]
        pictures = self.family.draw(inputs, prompts, seeds, drawing.settings)
        if drawing.reads_back:
            self._read_back(rows, pictures, first_index)
        for index, (row, picture) in enumerate(zip(rows, pictures, strict=True), first_index):
            row.part.image = picture
            event = {"type": "image", "part": row.part, "image": picture, "index": index}
            event["codes"] = list(row.part.codes)
            if row.answer is not None:
                done = _done(row.task, row.answer)
                event |= {"answer": done["answer"], "notes": done["notes"]}
            yield row.task, event

    def _previews(
        self, task: Task, codes: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> list[Image.Image]:
        """What the first codes of images, equally many, show."""
        assert task.drawing is not None
        settings = {**task.drawing.settings, "codes": len(codes[0])}
        if self.config.preview_inference_steps is not None:
            settings["num_inference_steps"] = self.config.preview_inference_steps
        return self.images.draw(codes, seeds=seeds, **settings)

    def _read_back(
        self,
        rows: Sequence[Undrawn],
        pictures: Sequence[Image.Image],
        first_index: int,
    ) -> None:
        """Describe drawings by their codes, or where prompts hold features by themselves, and the
        pictures that they had to change; note what contradicts the requests."""
        # 1. What is described: each picture once.
        reads_codes = self.config.abilities.reads_codes
        conversations: list[Any] = [row.task.request for row in rows]  # the last message was read
        world = self.family.world
        changed = [world.picture_to_change(turns, reads_codes) for turns in conversations]
        distinct = {id(picture): picture for picture in changed if picture is not None}
        drawn: list[Any] = [row.input for row in rows] if reads_codes else [*pictures]

        # 2. As `describe`, without its notes.
        settings = self.family.generation_settings("describe", {})
        tasks: list[Task] = []
        for item in (*drawn, *distinct.values()):
            turns = user_message([item, self.tasks.describe])
            tasks.append(Task("describe", turns, settings))
        descriptions: list[str] = []
        for answers in self.generate(tasks):
            descriptions += [self.family.text(item.answer, "describe") for item in answers]
        before = dict(zip(distinct, descriptions[len(rows) :], strict=True))

        # 3. The comparisons.
        for index, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
            is_only = len(rows) == 1 and first_index == 0
            which = "The image" if is_only else f"Image {first_index + index}"
            claim = text_before(row.parts, row.part)
            old = before.get(id(changed[index]))
            note = world.note(which, conversations[index], claim, old, descriptions[index])
            picture.info |= {DESCRIPTION: descriptions[index], NOTE: note}
            row.task.notes.add(note)

    # ---- likelihoods

    def answer_likelihoods(
        self,
        conversations: Sequence[Sequence[Message]],
        answers: Sequence[Sequence[str]],
        kind: TaskKind,
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
        settings = self.settings(kind, do_sample=False, num_beams=1)
        verdict_end = self.tasks.answer_after.rstrip()
        likelihoods: list[list[Likelihood]] = []
        for start in range(0, len(conversations), batch_size):
            batch = conversations[start : start + batch_size]
            prompts = self._prompts([Task(kind, turns, settings) for turns in batch])
            if verdict_end:
                verdicts = self.engine.generate(prompts, settings)
                for row, (prompt, ids) in enumerate(zip(prompts, verdicts, strict=True)):
                    # Up to the verdict's end; nothing without one.
                    lengths = range(1, len(ids) + 1)
                    texts_until = ((n, self.tokenizer.decode(ids[:n])) for n in lengths)
                    length = next((n for n, text in texts_until if verdict_end in text), 0)
                    prompts[row] = replace(prompt, ids=[*prompt.ids, *ids[:length]])
            continuations = [
                [self.tokenizer.encode(text) for text in texts]
                for texts in answers[start : start + batch_size]
            ]
            likelihoods += self.engine.likelihoods(prompts, continuations)
        return likelihoods


def _done(task: Task, answer: Answer) -> Event:
    """The last event of a task."""
    notes = [*task.notes]
    parts = [*answer.parts]
    texts = [index for index, part in enumerate(parts) if isinstance(part, str)]
    if task.notes.preface and texts:
        parts.insert(texts[0], PrefacePart(task.notes.preface))
    answer = replace(answer, parts=tuple(parts), notes=tuple(notes))
    return {"type": "done", "answer": answer, "notes": notes}


def text_before(parts: Sequence[object], image: ImagePart) -> str:
    """The text between an image of an answer and the one before it."""
    text = ""
    for part in parts:
        if part is image:
            break
        text = part if isinstance(part, str) else ""
    return text


def _until_stopped(request: GeneratedSequence) -> Iterator[Event]:
    """The events of a request, and the rest of its text where its caller stops it."""
    try:
        yield from request.events()
    except Stopped:
        texts = ("text", "reasoning")
        yield from (event for event in request.reader.close() if event["type"] in texts)
