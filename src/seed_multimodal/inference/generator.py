"""`Generator`: a language model with tokenizer and task settings; batched or streamed answers.

prompts ─► generate ─► ids ─► AnswerReader ─► events, or the parts of an `Answer`
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Literal

from PIL import Image

from seed_multimodal.errors import ConfigError
from seed_multimodal.inference.base_engine import BaseEngine
from seed_multimodal.inference.prompt import GenerationSettings, HiddenStates, Prompt, Stopped
from seed_multimodal.language.answer import AnswerReader, Event
from seed_multimodal.language.messages import Answer
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.settings import nearest, read_settings

Task = Literal["describe", "ask", "detect", "draw", "edit", "chat"]
Draw = Callable[[dict[str, Any]], Image.Image | None]  # event of an image or preview → image


class Generator:
    """Thread-safe generation of answers; subclasses define settings and end of answers."""

    defaults: ClassVar[dict[str, dict[str, Any]]] = {}  # generation settings by task
    drawing_settings: tuple[str, ...] = ()  # options that are not generation settings
    answer_after = ""  # see `TaskPrompts`

    def __init__(self, tokenizer: MultimodalTokenizer, engine: BaseEngine) -> None:
        self.tokenizer = tokenizer
        self.engine = engine

    # ---- a subclass defines

    def own_defaults(self, task: str) -> dict[str, Any]:
        """Generation settings of a task that override `defaults`."""
        return {}

    def ends(self, task: Task) -> Sequence[int] | None:
        """Tokens that end an answer; None: `</s>`."""
        return None

    def stop_sequences(self, task: str) -> tuple[str, ...]:
        """Texts that end an answer (tokens: `ends`)."""
        return ()

    def stop_after(self, task: str) -> str:
        """The end of a verdict, in which `stop_sequences` do not count; empty: they always count."""
        return ""

    # ---- settings

    def settings(self, task: str = "chat", **options: Any) -> GenerationSettings:
        """The defaults of a task, overridden by `options`. A temperature, top_p or top_k enables sampling (without
        beams), unless `do_sample` is set. Raises ConfigError: an unknown option, with the nearest; several answers."""
        known = [entry.name for entry in fields(GenerationSettings)]
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"Unknown option {name!r}{nearest(name, [*known, *self.drawing_settings])}."
                )
        if "do_sample" not in options and {"temperature", "top_p", "top_k"} & options.keys():
            options = {"do_sample": True, "num_beams": 1, **options}
        values = {
            "max_new_tokens": 256,
            "do_sample": False,
            **self.defaults.get(task, {}),
            **self.own_defaults(task),
            **options,
        }
        settings = read_settings(GenerationSettings, values, "Generation setting")
        if settings.num_return_sequences > 1:
            raise ConfigError(
                "num_return_sequences: each request gets one answer; for several, repeat the request with other seeds "
                "(draw and edit: num_images)."
            )
        return replace(
            settings,
            stop=(*self.stop_sequences(task), *settings.stop),
            stop_after=settings.stop_after or self.stop_after(task),
        )

    def forced(self, settings: GenerationSettings, given: dict[str, Any]) -> GenerationSettings:
        """Settings that force an image; a limit that was not `given` is raised to leave tokens for it."""
        needed = self.tokenizer.vocabulary.min_codes + 1
        if "max_new_tokens" in given and settings.max_new_tokens < needed:
            raise ConfigError(
                f"An image needs {needed} new tokens, but max_new_tokens is {settings.max_new_tokens}."
            )
        return replace(
            settings, force_image=True, max_new_tokens=max(settings.max_new_tokens, needed)
        )

    # ---- answers

    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings,
        task: Task = "chat",
        **how: Any,
    ) -> list[list[int]]:
        """The ids of each answer; `how`: `seeds`, `states`, `should_stop` of `Engine.generate`."""
        return self.engine.generate(prompts, settings, end_ids=self.ends(task), **how)

    def reader(self, settings: GenerationSettings, previews: Sequence[int] = ()) -> AnswerReader:
        """What cuts an answer at its end, and into events."""
        return AnswerReader(self.tokenizer, settings.stop, previews, settings.stop_after)

    def read_answer(self, ids: Sequence[int], settings: GenerationSettings) -> Answer:
        """The parts of an answer, cut at its end."""
        read = self.reader(settings).read_all(ids)
        return Answer(tuple(read.parts), tuple(read.ids), answer_after=self.answer_after)

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
        """Events of one answer, with decoded images; the last is `done` with the complete `Answer`."""
        reader = self.reader(settings, previews if settings.num_beams == 1 else ())

        def show(events: Sequence[Event]) -> Iterator[Event]:
            for event in events:
                if event["type"] in ("image", "image_preview"):
                    event["image"] = draw(event)
                if (part := event.pop("part", None)) is not None:
                    part.image = event["image"]
                yield event

        finish_reason = "cancelled"
        with contextlib.suppress(Stopped):
            request = self.engine.submit(
                prompt,
                settings,
                end_ids=self.ends(task),
                should_stop=should_stop,
                states=None if states is None else states[0],
            )
            try:
                for token in itertools.chain(request.initial_ids, request):
                    yield from show(reader.read(token))
                    if reader.finished:
                        break
            finally:
                request.cancel()  # a caller that leaves early, or a stop
            complete = reader.finished or request.finish_reason == "stop"
            finish_reason = "stop" if complete else "length"
            yield from show(reader.close())
        answer = Answer(
            tuple(reader.parts),
            tuple(reader.ids),
            prompt.note,
            self.answer_after,
            prompt_tokens=len(prompt) - len(prompt.answered),  # those are in the answer's ids
            finish_reason=finish_reason,
        )
        yield {"type": "done", "answer": answer}
