"""`Generator`: a language model with tokenizer and task settings; batched or streamed answers.

prompts ─► generate ─► ids ─► AnswerReader ─► events, or the parts of an `Answer`
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from PIL import Image

from seed_multimodal.errors import ConfigError, GenerationError
from seed_multimodal.inference.base_engine import BaseEngine
from seed_multimodal.inference.prompt import GenerationSettings, HiddenStates, Prompt, Stopped
from seed_multimodal.language.answer import Answer, AnswerReader, Event
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.settings import nearest, read_settings

Task = Literal["describe", "ask", "detect", "draw", "edit", "chat"]
Draw = Callable[[Event], Image.Image | None]  # event of an image or preview → image


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


class Generator:
    """Thread-safe generation of answers; subclasses define settings and ends of answers."""

    defaults: ClassVar[dict[str, dict[str, Any]]] = {}  # generation settings by task
    drawing_settings: tuple[str, ...] = ()  # options that are not generation settings
    answer_after = ""  # see `TaskPrompts`

    def __init__(self, tokenizer: TextTokenizer, engine: BaseEngine) -> None:
        self.tokenizer = tokenizer
        self.engine = engine

    # ---- a subclass defines

    def task_defaults(self, task: str) -> dict[str, Any]:
        """Generation settings of a task that override `defaults`."""
        return {}

    def ends(self, task: Task) -> Sequence[int] | None:
        """Tokens that end an answer; None: `</s>`."""
        return None

    def stop_sequences(self, task: str) -> tuple[str, ...]:
        """Texts that end an answer (tokens: `ends`)."""
        return ()

    def stop_after(self, task: str) -> str:
        """Where a verdict ends, before which `stop_sequences` do not count; empty: no verdict."""
        return ""

    # ---- settings

    def engine_settings(self, settings: GenerationSettings) -> GenerationSettings:
        """The settings with which an engine generates answers that `read_answer` then cuts."""
        return settings

    def settings(self, task: str = "chat", **options: Any) -> GenerationSettings:
        """The defaults of a task, overridden by `options`.

        A temperature, top_p or top_k enables sampling (without beams), unless `do_sample` is set.
        Raises ConfigError: an unknown option (with the nearest); several answers.
        """
        names = [entry.name for entry in fields(GenerationSettings)]
        for name in options:
            if name in self.drawing_settings:
                raise ConfigError(f"The option {name!r} is of drawing, but nothing is drawn.")
            if name not in names:
                suggestion = nearest(name, [*names, *self.drawing_settings])
                raise ConfigError(f"Unknown option {name!r}{suggestion}.")

        # Later mappings override earlier ones.
        if "do_sample" not in options and {"temperature", "top_p", "top_k"} & options.keys():
            options = {"do_sample": True, "num_beams": 1, **options}
        values = {
            "max_new_tokens": 256,
            "do_sample": False,
            **self.defaults.get(task, {}),
            **self.task_defaults(task),
            **options,
        }
        settings = read_settings(GenerationSettings, values, "Generation setting")
        if settings.num_return_sequences > 1:
            raise ConfigError(
                "num_return_sequences: each request gets one answer; for several, repeat the "
                "request with other seeds (draw and edit: num_images)."
            )
        return replace(
            settings,
            stop=(*self.stop_sequences(task), *settings.stop),
            stop_after=settings.stop_after or self.stop_after(task),
        )

    def forced(self, settings: GenerationSettings, options: dict[str, Any]) -> GenerationSettings:
        """Settings that force an image; the limit is raised if it leaves too few tokens for one.

        options: of the caller, whose `max_new_tokens` is not raised (ConfigError: it is too low).
        """
        needed = self.tokenizer.vocabulary.min_codes + 1
        if "max_new_tokens" in options and settings.max_new_tokens < needed:
            raise ConfigError(
                f"An image needs {needed} new tokens, but max_new_tokens is "
                f"{settings.max_new_tokens}."
            )
        return replace(
            settings, images="forced", max_new_tokens=max(settings.max_new_tokens, needed)
        )

    # ---- answers

    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings,
        task: Task = "chat",
        *,
        seeds: Sequence[int] | None = None,
        states: HiddenStates | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[list[int]]:
        """The ids of each answer; arguments as of `BaseEngine.generate`."""
        return self.engine.generate(
            prompts,
            self.engine_settings(settings),
            end_ids=self.ends(task),
            seeds=seeds,
            states=states,
            should_stop=should_stop,
        )

    def reader(self, settings: GenerationSettings, previews: Sequence[int] = ()) -> AnswerReader:
        """What cuts an answer at its end, and into events."""
        return AnswerReader(self.tokenizer, settings.stop, previews, settings.stop_after)

    def read_answer(self, ids: Sequence[int], settings: GenerationSettings) -> Answer:
        """The parts of an answer, cut at its end."""
        reader = self.reader(settings).read_all(ids)
        return Answer(tuple(reader.parts), tuple(reader.ids), answer_after=self.answer_after)

    def events(
        self,
        prompt: Prompt,
        settings: GenerationSettings,
        task: Task,
        draw: Draw,
        previews: Sequence[int] = (),
        should_stop: Callable[[], bool] | None = None,
        states: HiddenStates | None = None,
    ) -> Iterator[Event]:
        """Events of one answer, with decoded images; the last is `done` with the `Answer`.

        draw: decodes the image of an `image` or `image_preview` event.
        previews: numbers of codes after which an unfinished image is shown.
        """

        def draw_images(events: Iterable[Event]) -> Iterator[Event]:
            for event in events:
                if event["type"] in ("image", "image_preview"):
                    event["image"] = draw(event)
                part = event.pop("part", None)
                if part is not None:
                    part.image = event["image"]
                yield event

        # 1. Events, until the answer ends or the caller has left. Beams have no unfinished images:
        #    their tokens come at the end.
        request = self.engine.submit(
            prompt,
            settings,
            end_ids=self.ends(task),
            should_stop=should_stop,
            states=None if states is None else states[0],
            previews=previews if settings.num_beams == 1 else (),
        )
        reader = request.reader
        with contextlib.suppress(Stopped):
            yield from draw_images(request.events())

        # 2. The answer as a whole.
        answer = Answer(
            tuple(reader.parts),
            tuple(reader.ids),
            prompt.note,
            self.answer_after,
            prompt_tokens=len(prompt) - len(prompt.answered),  # those are in the answer's ids
            finish_reason=request.finish_reason or "cancelled",
        )
        yield {"type": "done", "answer": answer}
