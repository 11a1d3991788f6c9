"""What all systems that describe, answer, draw, edit and chat have in common (`System`), and what those share whose
answers mix texts and pictures: `SeedLlama` and `SeedX` are such `TalkingSystem`s.

    messages ─► read_messages ─► _request: prompt ids ─► Speaker ─► answer ids ─► texts and pictures

A system says how a conversation becomes a `Request`, and what `paint` makes of a picture that the model wrote; the rest
is here. One instance may be used from several threads; its language model and its picture half each serve one at a
time, and answers are those of calls one after another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, overload

from PIL import Image

from seed_multimodal.errors import ConfigError, GenerationError
from seed_multimodal.language.answer import AnswerPart, ImagePart, split_answer
from seed_multimodal.language.generation import GenerationSettings
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.settings import check_value, nearest, read_settings
from seed_multimodal.system.domain import read_known_words
from seed_multimodal.systems.batch import BatchMethods
from seed_multimodal.systems.chat import Answer, Content, DrawnPart, as_parts, as_text, read_messages
from seed_multimodal.systems.pictures import is_picture
from seed_multimodal.systems.speaker import Event, Speaker

Log = Callable[[str], None] | None
Painted = list[Image.Image | None]


@dataclass
class Request:
    """What a language model is asked.

    Attributes:
        ids: the prompt, `<s>` first. reading: further arguments of `generate_ids`.
        paint: whole pictures of the answer, the seed, settings of the de-tokenizer -> the pictures.
        seen: whether it holds a picture. note: what the system says of the request.
    """

    ids: list[int]
    paint: Callable[[Sequence[ImagePart], int | None, dict[str, Any]], Painted]
    reading: dict[str, Any] = field(default_factory=dict)
    seen: bool = False
    note: str = ""


class System:
    """What commands ask of any system.

    Attributes:
        decode_keys: options of the methods that go to the de-tokenizer.
    """

    decode_keys: ClassVar[tuple[str, ...]]
    spec: Any
    tokenizer: MultimodalTokenizer
    llm: Any
    pictures: Any
    log: Log = None

    def describe(self, image: Any, prompt: str | None = None, **options: Any) -> str:
        """What `image` shows (a picture, or several of them); `prompt` replaces the usual request."""
        raise NotImplementedError

    def ask(self, image: Any, question: str, *, short: bool = True, **options: Any) -> str:
        """The answer to `question` about `image` (or several); `short`: as the system was taught to be asked."""
        raise NotImplementedError

    def detect(self, image: Any, phrase: str, **options: Any) -> Any:
        """Where `phrase` is in a picture, for systems that answer with boxes (`SeedX`)."""
        raise ConfigError(f"{self.spec.name} answers without boxes, so it cannot say where things are; SEED-X can.")

    def draw(self, text: str, seed: int = 0, *, codes: Any = None, **options: Any) -> Any:
        """A picture of `text`."""
        raise NotImplementedError

    def edit(self, image: Any, instruction: str, seed: int = 0, **options: Any) -> Image.Image:
        """`image` after `instruction`."""
        raise NotImplementedError

    def note(self, content: Sequence[Any]) -> str:
        """What there is to say of a message's words and pictures that are unlike those of the training, or nothing."""
        words = [item for item in content if isinstance(item, str)]
        known = read_known_words(self.spec.known_words).note(" ".join(words)) if self.spec.known_words else ""
        return " ".join(filter(None, (known, self.pictures.note(list(filter(is_picture, content))))))

    def _remark(self, note: str) -> None:
        if self.log and note:
            self.log(note)

    def _take_decode(self, options: dict[str, Any]) -> dict[str, Any]:
        """Remove the de-tokenizer's settings from `options` and give them."""
        return {key: options.pop(key) for key in self.decode_keys if key in options}

    def _shown(self, image: Any) -> list[Any]:
        """Pictures of a task's message; a string is a file name there."""
        return [Path(item) if isinstance(item, str) else item for item in as_parts(image, "The picture")]


class TalkingSystem(BatchMethods, System):
    """Base of the systems whose language model writes texts and pictures in one answer; see `SeedLlama` and `SeedX` for
    how they are made."""

    tasks: Any
    speaker: Speaker

    def to_request(self, contents: Sequence[Content], opening: str = "", task: str = "") -> Request:
        """A conversation as the model is asked it.

        Args:
            contents: role and items (texts, pictures, codes) of each message.
            opening: words of a forced answer that will follow the prompt.
            task: "ask", "draw" or "edit"; "" for a conversation.

        Raises:
            RequestError, ImageError: contents that cannot be read.
        """
        raise NotImplementedError

    # ---- tasks

    def describe(self, image: Any, prompt: str | None = None, **options: Any) -> str:
        return self._say([*self._shown(image), self.tasks.describe if prompt is None
                          else as_text(prompt, "The request")], options)

    def ask(self, image: Any, question: str, *, short: bool = True, **options: Any) -> str:
        question = as_text(question, "The question")
        return self._say([*self._shown(image), self.tasks.question(question) if short else question], options)

    @overload
    def chat(self, messages: Sequence[Any], stream: Literal[False] = False, **options: Any) -> Answer: ...

    @overload
    def chat(self, messages: Sequence[Any], stream: Literal[True], **options: Any) -> Iterator[Event]: ...

    def chat(
        self, messages: Sequence[Any], stream: bool = False, *, force_image: bool = False,
        previews: Sequence[int] | None = None, **options: Any
    ) -> Answer | Iterator[Event]:
        """Answer the last message of a conversation (see `systems.chat` for the form of messages).

        Args:
            stream: give events (see `systems.speaker`) while the answer is made, instead of the `Answer`.
            force_image: make the model answer with a picture.
            previews: after how many codes a stream shows what there is of a picture; None: as `system.json` says.
        """
        decode = self._take_decode(options)
        settings = self.settings(**options)
        if decode and self.pictures.can_draw:
            self.pictures.check_drawing(**decode)
        contents, opening = read_messages(messages), ""
        if force_image:
            seen = any(not isinstance(item, str) for _, items in contents for item in items)
            opening = self.forced_opening(seen)
            settings = self._forced(settings, options)
        request = self.to_request(contents, opening)
        if stream:
            due = check_value(Sequence[int], self.spec.previews if previews is None else previews, "previews", least=1)
            if due and not self.pictures.has_codes:
                raise ConfigError("This system can show a picture only when it is whole: there are no previews of it.")
            events = self.speaker.events(request.ids, settings, opening, due if self.pictures.can_draw else (),
                                         reading=request.reading)
            return self._stream(events, request, settings.seed, decode)
        ids = self.speaker.answer(request.ids, settings, opening, reading=request.reading)
        drawn = [part for part in split_answer(ids, self.tokenizer) if isinstance(part, ImagePart)]
        return self._answer(ids, self._painted(request, drawn, settings.seed, decode), request.note)

    # ---- building blocks

    def settings(self, **options: Any) -> GenerationSettings:
        """The system's defaults with `options` over them.

        A given temperature, top_p or top_k switches drawing of tokens on, unless `do_sample` is given too.

        Raises:
            ConfigError: an unknown option (names the nearest) or a value out of range.
        """
        merged = {"max_new_tokens": 256, "do_sample": False, **self.spec.generation, **options}
        known = [entry.name for entry in fields(GenerationSettings)]
        for name in merged:
            if name not in known:
                raise ConfigError(f"Unknown option {name!r}{nearest(name, [*known, *self.decode_keys])}.")
        if "do_sample" not in options and any(key in options for key in ("temperature", "top_p", "top_k")):
            merged["do_sample"] = True
        return read_settings(GenerationSettings, merged, "Generation setting")

    def forced_opening(self, seen: bool) -> str:
        """The words before a forced picture in a conversation with a picture (`seen`), or without."""
        return str(self.tasks.edit_response if seen else self.tasks.draw_response)

    # ---- inside

    def _forced(self, settings: GenerationSettings, given: dict[str, Any]) -> GenerationSettings:
        """Settings that force a picture; the system's own limit is raised to leave room for it, a given one is kept,
        or refused (`ConfigError`) if no picture fits into it."""
        needed = self.tokenizer.vocabulary.tokens_per_image + 1
        if "max_new_tokens" in given and settings.max_new_tokens < needed:
            raise ConfigError(f"A picture needs {needed} new tokens: max_new_tokens {settings.max_new_tokens} is too "
                              f"small for a request that must be answered with one.")
        return replace(settings, force_image=True, max_new_tokens=max(settings.max_new_tokens, needed))

    def _task(self, content: list[Any], task: str, opening: str = "") -> Request:
        return self.to_request(read_messages([{"role": "user", "content": content}]), opening, task)

    def _say(self, content: list[Any], options: dict[str, Any]) -> str:
        """The text of an answer; pictures in it are not drawn."""
        request = self._task(content, "ask")
        self._remark(request.note)
        ids = self.speaker.answer(request.ids, self.settings(**options), reading=request.reading)
        return self._words(Answer(split_answer(ids, self.tokenizer), answer_after=self.tasks.answer_after))

    def _one_picture(self, task: str, content: list[Any], opening: str, options: dict[str, Any],
                     decode: dict[str, Any], words: int = 0) -> tuple[Request, ImagePart, int]:
        """The one picture of an answer as the model wrote it, with its request and the seed to draw it with.

        Args:
            decode: settings of the de-tokenizer, which are checked before the model writes.
            words: tokens in which the model may first say something; only where no picture comes then, it is forced.

        Raises:
            GenerationError: no whole picture.
        """
        settings = self._forced(self.settings(**options), options)
        settings = replace(settings, max_new_tokens=self.tokenizer.vocabulary.tokens_per_image + 1)  # no words after it
        self.pictures.check_drawing(**decode)  # a missing de-tokenizer is reported now, too
        drawn: list[AnswerPart] = []
        answer = Answer(())
        free = replace(settings, force_image=False, max_new_tokens=settings.max_new_tokens + words)
        for how, start in ((free, ""), (settings, opening))[not words:]:
            if len(drawn) != 1:
                request = self._task(content, task, start)
                ids = self.speaker.answer(request.ids, how, start, reading=request.reading)
                answer = Answer(split_answer(ids, self.tokenizer))
                drawn = [part for part in answer.parts if isinstance(part, ImagePart)]
        self._remark(request.note)
        if len(drawn) != 1 or not isinstance(drawn[0], ImagePart):
            raise GenerationError("The model's answer holds no whole picture"
                                  + (f": {answer.problems[0]}" if answer.problems else "."))
        return request, drawn[0], settings.seed or 0

    def _painted(self, request: Request, parts: Sequence[ImagePart], seed: int | None,
                 decode: dict[str, Any]) -> Painted:
        if not parts or not self.pictures.can_draw:
            return [None] * len(parts)
        return request.paint(parts, seed, decode)

    def _stream(self, events: Iterator[Event], request: Request, seed: int | None,
                decode: dict[str, Any]) -> Iterator[Event]:
        """A speaker's events with the pictures drawn, and the whole answer at the end."""
        images: Painted = []
        with contextlib.closing(events):  # type: ignore[type-var]
            for event in events:
                if event["type"] == "image_preview":
                    event = {**event, "image": self.pictures.preview(event["codes"], seed, **decode)}
                elif event["type"] == "image":
                    part = ImagePart(event["codes"], place=event.pop("place"))
                    images += self._painted(request, [part], seed, decode)
                    event = {**event, "image": images[-1]}
                elif event["type"] == "end":
                    event = {"type": "done", "answer": self._answer(event["ids"], images, request.note)}
                yield event

    def _answer(self, ids: list[int], images: Sequence[Image.Image | None], note: str = "") -> Answer:
        rest = iter(images)
        parts: list[AnswerPart] = [DrawnPart(part.codes, next(rest)) if isinstance(part, ImagePart) else part
                                   for part in split_answer(ids, self.tokenizer)]
        return Answer(tuple(parts), tuple(ids), note, self.tasks.answer_after)
