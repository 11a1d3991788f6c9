"""An answer while it is generated: tokens out of a thread, and events out of tokens.

Events: `{"type": "text", "text": …}`, `{"type": "image_start"}`, `{"type": "image", "image": PIL, "codes": […]}`,
`{"type": "image_broken", "reason": …}`, and last `{"type": "done", "answer": Answer}`; where previews are asked for,
`{"type": "image_preview", "image": PIL, "codes": […]}` with the first codes of an image and what they show.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

from torch import Tensor

from seed_multimodal.language.answer import AnswerPart, ImagePart, TextPart, split_answer
from seed_multimodal.language.generation import Stopped
from seed_multimodal.language.tokenizer import MultimodalTokenizer

Event = dict[str, Any]
_END = object()


class AnswerReader:
    """Reads an answer token by token; `ids` are the tokens that belong to it so far.

    It ends at `</s>` or where the text holds one of `stops` (the marker of a user's turn; LaVIT's ends of captions and
    answers). Text is held back while its end may be incomplete: half a character, or the first letters of a stop.

    Args:
        previews: after how many codes of an image there is an event with them.
        after: text up to and including these characters is a verdict, in which no stop is looked for and of which there
            are no events.
    """

    def __init__(self, tokenizer: MultimodalTokenizer, stops: Sequence[str] = (), previews: Sequence[int] = (),
                 after: str = "") -> None:
        self.tokenizer, self.stops, self.previews, self.after = tokenizer, tuple(filter(None, stops)), previews, after
        self.ids: list[int] = []
        self.finished = False
        self._run: list[int] = []  # tokens since the last change between text and image
        self._given = 0  # characters of the run's text already given out

    def read(self, token: int) -> list[Event]:
        """Add one token and return the events it completes; an image's event holds its `ImagePart`."""
        if self.finished:
            return []
        words = self.tokenizer.vocabulary
        if self._run and self._run[0] == words.boi_id and words.counts_for_nothing(token):
            return []
        if token == self.tokenizer.eos_id:
            events = self._flush()
            self.ids += [] if self.finished else [token]
            self.finished = True
            return events
        events = [] if self._continues(token) else self._flush()
        if token == words.boi_id:
            events.append({"type": "image_start"})
        self.ids.append(token)
        self._run.append(token)
        if not words.is_image_word(self._run[0]):
            return events + self._new_text(final=False)
        return events + (self._flush() if token == words.eoi_id else self._preview())

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
        """Whether `token` belongs to the present run: a text, an image from its `<img>` on, or stray codes."""
        words = self.tokenizer.vocabulary
        if not self._run or self._run[0] == words.boi_id:
            return token != words.boi_id
        if words.is_code_id(self._run[0]):
            return words.is_code_id(token)
        return not words.is_image_word(token)

    def _flush(self) -> list[Event]:
        """End the present run and return its content."""
        if not self._run:
            return []
        if self.tokenizer.vocabulary.is_image_word(self._run[0]):
            start = len(self.ids) - len(self._run)
            events = [_event(part, start) for part in split_answer(self._run, self.tokenizer)]
        else:
            events = self._new_text(final=True)
        self._run, self._given = [], 0
        return events

    def _preview(self) -> list[Event]:
        """The codes of an image so far, where a preview is due."""
        words, (first, *rest) = self.tokenizer.vocabulary, self._run
        due = first == words.boi_id and len(rest) in self.previews and all(map(words.is_code_id, rest))
        return [{"type": "image_preview", "codes": words.id_to_code(rest)}] if due else []

    def _new_text(self, final: bool) -> list[Event]:
        text = self.tokenizer.decode(self._run, skip_special_tokens=True)
        start = text.find(self.after) + len(self.after) if self.after and self.after in text else 0
        if self.after and not start and not final:
            return []
        stop = self._first_stop(text, start)
        if stop is not None:
            self._cut(start)
            text, final, self.finished = text[:stop].rstrip(" "), True, True
        end = len(text) if final else len(text) - self._unsettled(text)
        new, self._given = text[max(self._given, start):end], max(self._given, end)
        return [{"type": "text", "text": new}] if new else []

    def _first_stop(self, text: str, start: int) -> int | None:
        """Where in a text the first stop begins; blanks alone before it do not count as an answer."""
        start += len(text[start:]) - len(text[start:].lstrip())
        places = [place for place in (text.find(stop, start) for stop in self.stops) if place >= 0]
        return min(places, default=None)

    def _cut(self, start: int) -> None:
        """Drop the tokens of the stop, and all after it."""
        while self._run:
            text = self.tokenizer.decode(self._run, skip_special_tokens=True)
            if self._first_stop(text, start) is None and not self._opened(text) and not text.endswith(" "):
                break
            self._run.pop()
            self.ids.pop()

    def _unsettled(self, text: str) -> int:
        """Characters at the end of `text` that later tokens may still change."""
        broken = len(text) - len(text.rstrip("\ufffd"))
        return max([broken, self._opened(text), *(_overlap(text, f" {stop}") for stop in self.stops)])

    def _opened(self, text: str) -> int:
        """The length of the longest beginning of a stop that `text` ends with."""
        return max((_overlap(text, stop) for stop in self.stops), default=0)


def _event(part: AnswerPart, start: int) -> Event:
    """The event of a part of a run that begins at id `start` of the answer."""
    if isinstance(part, ImagePart):
        return {"type": "image", "part": ImagePart(part.codes, place=start + part.place), "codes": list(part.codes)}
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image_broken", "reason": part.reason}


def _overlap(text: str, stop: str) -> int:
    """The longest beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)


class TokenStreamer:
    """A transformers streamer that hands every new token on, and stops generation when `take` returns False."""

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
                raise Stopped

    def end(self) -> None:
        """Called by `generate` at the end; nothing to do."""


def tokens_from_thread(produce: Callable[[TokenStreamer], Any]) -> Generator[int, None, None]:
    """Run `produce(streamer)` in a thread and yield its tokens.

    The thread begins with the first token that is asked for, and does not wait for its tokens to be read. Leaving the
    iterator early ends the generation; an exception in the thread is raised here.
    """
    channel: queue.Queue[Any] = queue.Queue()
    left = threading.Event()

    def take(token: int) -> bool:
        channel.put(token)
        return not left.is_set()

    def work() -> None:
        try:
            produce(TokenStreamer(take))
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 (raised in the consumer's thread)
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
