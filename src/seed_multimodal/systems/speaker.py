"""The language half of a system: prompt ids in, one answer out, whole or as events while it is made.

An answer ends at `</s>`, at the token budget, or where the model begins a user's turn (`marker`). A forced answer opens
with fixed words and `<img>`; they count as part of it. `reading`: more arguments of `generate_ids`, for pictures that
are features.

Events: `{"type": "text", "text": …}`, `{"type": "image_start"}`, `{"type": "image", "image": PIL, "codes": […]}`,
`{"type": "image_broken", "reason": …}`, and last `{"type": "done", "answer": Answer}`; where previews are asked for,
`{"type": "image_preview", "image": PIL, "codes": […]}` with the first codes of a picture and what they show.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from seed_multimodal.language.answer import BrokenImagePart, ImagePart, split_answer
from seed_multimodal.language.generation import GenerationSettings, generate_ids
from seed_multimodal.language.tokenizer import MultimodalTokenizer

Event = dict[str, Any]
_END = object()


class StopGeneration(Exception):  # noqa: N818 (a signal, like StopIteration)
    """Raised inside `model.generate` by a streamer to end it; never leaves this package."""


class AnswerReader:
    """Reads an answer token by token; `ids` are the tokens that belong to it so far.

    Text is held back while its end may be incomplete: half a character, or the first letters of `marker` (the user's
    role), at which the answer ends; the blank before it begins the user's turn, too (every span has one). After so many
    codes of a picture as `previews` name there is an event with them.
    """

    def __init__(self, tokenizer: MultimodalTokenizer, marker: str = "", previews: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.marker = marker
        self.previews = previews
        self.ids: list[int] = []
        self.finished = False
        self._run: list[int] = []  # tokens since the last change between text and picture
        self._told = 0  # characters of the run's text already given out

    def read(self, token: int) -> list[Event]:
        """Add one token and return the events it completes (a picture's event holds codes, not yet the picture)."""
        if self.finished:
            return []
        if token == self.tokenizer.eos_id:
            self.ids.append(token)
            return self.close()
        boi, eoi = self.tokenizer.vocabulary.boi_id, self.tokenizer.vocabulary.eoi_id
        events = [] if self._continues(token) else self._flush()
        if token == boi:
            events.append({"type": "image_start"})
        self.ids.append(token)
        self._run.append(token)
        if not self.tokenizer.vocabulary.is_image_word(self._run[0]):
            return events + self._new_text(final=False)
        return events + (self._flush() if token == eoi else self._preview())

    def read_all(self, tokens: Iterable[int]) -> list[int]:
        """Add a whole answer; returns the tokens that belong to it."""
        for token in tokens:
            self.read(token)
        self.close()
        return self.ids

    def close(self) -> list[Event]:
        """The events still held back."""
        events = self._flush()
        self.finished = True
        return events

    def _continues(self, token: int) -> bool:
        """Whether `token` belongs to the present run: a text, a picture from its `<img>` on, or stray codes."""
        words = self.tokenizer.vocabulary
        if not self._run or self._run[0] == words.boi_id:
            return token != words.boi_id
        if words.is_code_id(self._run[0]):
            return words.is_code_id(token)
        return not self.tokenizer.vocabulary.is_image_word(token)

    def _flush(self) -> list[Event]:
        """End the present run and return its content."""
        if not self._run:
            return []
        if self.tokenizer.vocabulary.is_image_word(self._run[0]):
            start = len(self.ids) - len(self._run)
            events = [_event(part, start) for part in split_answer(self._run, self.tokenizer)]
        else:
            events = self._new_text(final=True)
        self._run, self._told = [], 0
        return events

    def _preview(self) -> list[Event]:
        """The codes of a picture so far, where a preview is due."""
        words, (first, *rest) = self.tokenizer.vocabulary, self._run
        due = first == words.boi_id and len(rest) in self.previews and all(map(words.is_code_id, rest))
        return [{"type": "image_preview", "codes": words.id_to_code(rest)}] if due else []

    def _new_text(self, final: bool) -> list[Event]:
        text = self.tokenizer.decode(self._run, skip_special_tokens=True)
        found = text.find(self.marker) if self.marker else -1
        if found >= 0:
            self._cut()
            text, final, self.finished = text[:found].rstrip(" "), True, True
        end = len(text) if final else len(text) - _unsettled(text, self.marker)
        new, self._told = text[self._told:end], max(self._told, end)
        return [{"type": "text", "text": new}] if new else []

    def _cut(self) -> None:
        """Drop the tokens of the marker, and all after it."""
        while self._run:
            text = self.tokenizer.decode(self._run, skip_special_tokens=True)
            if self.marker not in text and not _overlap(text, self.marker) and not text.endswith(" "):
                break
            self._run.pop()
            self.ids.pop()


def _event(part: Any, start: int) -> Event:
    """The event of a part of a run that begins at id `start` of the answer."""
    if isinstance(part, ImagePart):
        return {"type": "image", "codes": list(part.codes), "place": start + part.place}
    if isinstance(part, BrokenImagePart):
        return {"type": "image_broken", "reason": part.reason}
    return {"type": "text", "text": part.text}


def _unsettled(text: str, marker: str) -> int:
    """Characters at the end of `text` that later tokens may still change."""
    broken = len(text) - len(text.rstrip("\ufffd"))
    return max(broken, _overlap(text, marker), _overlap(text, f" {marker}") if marker else 0)


def _overlap(text: str, marker: str) -> int:
    """The longest beginning of `marker` that `text` ends with."""
    return next((n for n in range(min(len(text), len(marker)), 0, -1) if text.endswith(marker[:n])), 0)


class ReadingStreamer:
    """A transformers streamer that reads the answer as it grows and ends generation where it ends."""

    def __init__(self, take: Callable[[int], bool]) -> None:
        self._take = take
        self._seen_prompt = False

    def put(self, value: Tensor) -> None:
        """Called by `generate`: first with the prompt, then with each new token."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        for token in value.flatten().tolist():
            if not self._take(int(token)):
                raise StopGeneration

    def end(self) -> None:
        """Called by `generate` at the end; nothing to do."""


def tokens_from_thread(produce: Callable[[ReadingStreamer], Any], lock: threading.Lock | None = None) -> Iterator[int]:
    """Run `produce(streamer)` in a thread and give its tokens as they come.

    The thread begins with the first token that is asked for, and does not wait for its tokens to be read. Leaving the
    iterator early ends the generation; an exception in the thread is raised here.

    Args:
        lock: held by the thread while it produces, so never while the reader of the tokens does something else.
    """
    channel: queue.Queue[Any] = queue.Queue()
    left = threading.Event()

    def take(token: int) -> bool:
        channel.put(token)
        return not left.is_set()

    def work() -> None:
        try:
            with lock or contextlib.nullcontext():
                produce(ReadingStreamer(take))
        except StopGeneration:
            pass
        except BaseException as error:  # noqa: BLE001 (handed over to the consumer's thread, where it is raised)
            channel.put(error)
        finally:
            channel.put(_END)

    thread = threading.Thread(target=work, name="seed-generate", daemon=True)
    thread.start()
    try:
        while (item := channel.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()
        thread.join()


class Speaker:
    """A LLaMA and its tokenizer, answering one prompt at a time.

    It may be used from several threads: a lock is held while tokens are generated, by streams too. These generate at
    their own pace, whoever reads them, so one that is not read on keeps others waiting no longer than its answer takes.
    """

    def __init__(self, llm: Any, tokenizer: MultimodalTokenizer, marker: str = "",
                 resident: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext) -> None:
        """`resident`: inside it, the model is where it computes."""
        self.llm = llm
        self.tokenizer = tokenizer
        self.marker = marker
        self.resident = resident
        self._lock = threading.Lock()

    def answer(self, prompt: Sequence[int], settings: GenerationSettings, opening: str | Sequence[int] = "",
               watch: Callable[[], None] | None = None, reading: Mapping[str, Any] | None = None) -> list[int]:
        """The ids of one answer.

        Args:
            opening: fixed first words of it; or the ids at the prompt's end that belong to it already.
            watch, reading: of `generate_ids`.
        """
        prompt, fixed = self._open(prompt, opening, settings)
        reader = AnswerReader(self.tokenizer, self.marker)
        if settings.num_beams > 1:  # beams cannot be watched: read the best one afterwards
            return reader.read_all([*fixed, *self._best(prompt, settings, watch, reading)])
        for token in fixed:
            reader.read(token)

        def take(token: int) -> bool:
            reader.read(token)
            return not reader.finished

        with self._lock, contextlib.suppress(StopGeneration):
            self._generate(prompt, settings, watch, reading, ReadingStreamer(take))
        return reader.read_all(())

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Inside, the model is where it computes, and this thread alone uses it."""
        with self._lock, self.resident():
            yield

    def events(self, prompt: Sequence[int], settings: GenerationSettings, opening: str | Sequence[int] = "",
               previews: Sequence[int] = (), watch: Callable[[], None] | None = None,
               reading: Mapping[str, Any] | None = None) -> Generator[Event, None, None]:
        """The same answer as events while it is made (pictures as codes); the last one is `{"type": "end", "ids": …}`.

        With several beams all events come at the end, when the best one is known, and there are no previews.

        Args:
            opening: as of `answer`.
            previews: after how many of a picture's codes there is an `image_preview`.
        """
        settings = settings.with_seed()  # now: the caller may reseed torch before the first token is asked for
        prompt, fixed = self._open(prompt, opening, settings)
        return self._events(prompt, fixed, settings, previews if settings.num_beams == 1 else (), watch,
                            reading)

    def _events(self, prompt: list[int], fixed: list[int], settings: GenerationSettings, previews: Sequence[int],
                watch: Callable[[], None] | None, reading: Mapping[str, Any] | None) -> Generator[Event, None, None]:
        reader = AnswerReader(self.tokenizer, self.marker, previews)
        for token in fixed:
            yield from reader.read(token)
        tokens: Iterator[int]
        if settings.num_beams > 1:
            tokens = (token for token in self._best(prompt, settings, watch, reading))
        else:
            tokens = tokens_from_thread(
                lambda streamer: self._generate(prompt, settings, watch, reading, streamer), self._lock)
        with contextlib.closing(tokens):  # type: ignore[type-var]  # leaving early ends the thread
            for token in tokens:
                yield from reader.read(token)
                if reader.finished:
                    break
        yield from reader.close()
        yield {"type": "end", "ids": reader.ids}

    def _best(self, prompt: Sequence[int], settings: GenerationSettings, watch: Callable[[], None] | None,
              reading: Mapping[str, Any] | None) -> list[int]:
        """The best beam's tokens, without a forced `<img>`."""
        with self._lock:
            return self._generate(prompt, settings, watch, reading)[int(settings.force_image):]

    def _generate(self, prompt: Sequence[int], settings: GenerationSettings, watch: Callable[[], None] | None,
                  reading: Mapping[str, Any] | None, streamer: Any = None) -> list[int]:
        with self.resident():
            return generate_ids(self.llm, [prompt], settings, self.tokenizer, streamer, watch, **(reading or {}))[0]

    def _open(self, prompt: Sequence[int], opening: str | Sequence[int],
              settings: GenerationSettings) -> tuple[list[int], list[int]]:
        """The prompt with the words of a forced answer, and the tokens of the answer that are fixed already."""
        if not isinstance(opening, str):
            return list(prompt), list(opening)
        words = self.tokenizer.encode_parts([opening]) if opening else []
        forced = [self.tokenizer.vocabulary.boi_id] if settings.force_image else []
        return [*prompt, *words], words + forced
