"""`Generator`: a language model with tokenizer and task settings; batched or streamed answers.

    prompts ─► generate ─► ids ─► AnswerReader ─► events, or the parts of an `Answer`
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, ClassVar, Literal

from PIL import Image

from seed_multimodal.errors import ConfigError
from seed_multimodal.language.answer import AnswerReader, Event
from seed_multimodal.language.engine import Engine
from seed_multimodal.language.generation import GenerationSettings, HiddenStates, Prompt, Stopped, generate
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

    def __init__(self, tokenizer: MultimodalTokenizer, llm: Any) -> None:
        self.tokenizer, self.llm, self.engine = tokenizer, llm, Engine(llm, tokenizer)

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
        beams), unless `do_sample` is set. Raises ConfigError: an unknown option, with the nearest."""
        known = [entry.name for entry in fields(GenerationSettings)]
        for name in options:
            if name not in known:
                raise ConfigError(f"Unknown option {name!r}{nearest(name, [*known, *self.drawing_settings])}.")
        if "do_sample" not in options and {"temperature", "top_p", "top_k"} & options.keys():
            options = {"do_sample": True, "num_beams": 1, **options}
        values = {"max_new_tokens": 256, "do_sample": False, **self.defaults.get(task, {}),
                  **self.own_defaults(task), **options}
        settings = read_settings(GenerationSettings, values, "Generation setting")
        return replace(settings, stop=(*self.stop_sequences(task), *settings.stop),
                       stop_after=settings.stop_after or self.stop_after(task))

    def forced(self, settings: GenerationSettings, given: dict[str, Any]) -> GenerationSettings:
        """Settings that force an image; a limit that was not `given` is raised to leave tokens for it."""
        needed = self.tokenizer.vocabulary.least_codes + 1
        if "max_new_tokens" in given and settings.max_new_tokens < needed:
            raise ConfigError(f"An image needs {needed} new tokens, but max_new_tokens is {settings.max_new_tokens}.")
        return replace(settings, force_image=True, max_new_tokens=max(settings.max_new_tokens, needed))

    # ---- answers

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings, task: Task = "chat",
                 **how: Any) -> list[list[int]]:
        """The ids of each answer; `how`: `seeds`, `states`, `should_stop` of `language.generation.generate`."""
        how["ends"] = self.ends(task)
        if settings.num_beams == 1:
            return self.engine.generate(prompts, settings, **how)
        with_beams = partial(generate, self.llm, self.tokenizer, prompts, settings, **how)
        return list(self.engine.run(with_beams))

    def reader(self, settings: GenerationSettings, previews: Sequence[int] = ()) -> AnswerReader:
        """What cuts an answer at its end, and into events."""
        return AnswerReader(self.tokenizer, settings.stop, previews, settings.stop_after)

    def read_answer(self, ids: Sequence[int], settings: GenerationSettings) -> Answer:
        """The parts of an answer, cut at its end."""
        read = self.reader(settings).read_all(ids)
        return Answer(tuple(read.parts), tuple(read.ids), answer_after=self.answer_after)

    def events(self, prompt: Prompt, settings: GenerationSettings, task: Task, draw: Draw, previews: Sequence[int] = (),
               should_stop: Callable[[], bool] | None = None, **how: Any) -> Iterator[Event]:
        """Events of one answer, with decoded images; the last is `done` with the complete `Answer`."""
        reader = self.reader(settings, previews if settings.num_beams == 1 else ())

        def show(events: Sequence[Event]) -> Iterator[Event]:
            for event in events:
                if event["type"] in ("image", "image_preview"):
                    event["image"] = draw(event)
                if (part := event.pop("part", None)) is not None:
                    part.image = event["image"]
                yield event

        with contextlib.suppress(Stopped):
            tokens: Any = self._tokens(prompt, settings, task, should_stop=should_stop, **how)
            with contextlib.closing(tokens):  # leaving early cancels the request
                for token in tokens:
                    yield from show(reader.read(token))
                    if reader.finished:
                        break
            yield from show(reader.close())
        yield {"type": "done", "answer": Answer(tuple(reader.parts), tuple(reader.ids), prompt.note, self.answer_after,
                                                len(prompt))}

    def _tokens(self, prompt: Prompt, settings: GenerationSettings, task: Task, states: HiddenStates | None = None,
                should_stop: Callable[[], bool] | None = None) -> Iterator[int]:
        """Stream the tokens of one answer; with beams all at the end."""
        if settings.num_beams > 1:
            yield from self.generate([prompt], settings, task, states=states, should_stop=should_stop)[0]
        else:
            request = self.engine.submit(prompt, settings, ends=self.ends(task), should_stop=should_stop,
                                         states=None if states is None else states[0])
            yield from request.answered
            yield from request
