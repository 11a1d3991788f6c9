"""An answer while it is generated: events out of tokens.

Events: `{"type": "text", "text": …}`, `{"type": "image_start"}`, `{"type": "image", "image": PIL, "codes": […]}`,
`{"type": "image_broken", "reason": …}`, and last `{"type": "done", "answer": Answer}`; where previews are asked for,
`{"type": "image_preview", "image": PIL, "codes": […]}` with the first codes of an image and what they show.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from seed_multimodal.language.answer import AnswerPart, ImagePart, TextPart, split_answer
from seed_multimodal.language.tokenizer import MultimodalTokenizer

Event = dict[str, Any]


class AnswerReader:
    """Reads an answer token by token; `ids` are the tokens that belong to it so far.

    It ends at `</s>` or where the text holds one of `stops`. Text is held back while its end may be incomplete: half a
    character, or the first letters of a stop. `previews`: after how many codes of an image there is an event with them;
    `after`: text up to and including these characters is a verdict, without stops and events.
    """

    def __init__(self, tokenizer: MultimodalTokenizer, stops: Sequence[str] = (), previews: Sequence[int] = (),
                 after: str = "") -> None:
        self.tokenizer, self.stops, self.previews, self.after = tokenizer, tuple(filter(None, stops)), previews, after
        self.ids: list[int] = []
        self.finished = False
        self._run: list[int] = []  # tokens since the last change between text and image
        self._sent = 0  # characters of the run's text that were events already

    def read(self, token: int) -> list[Event]:
        """Add one token and return the events it completes; an image's event holds its `ImagePart`."""
        words = self.tokenizer.vocabulary
        in_image = self._run[:1] == [words.boi_id]
        if self.finished or (in_image and words.counts_for_nothing(token)):
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
        if token == words.eoi_id:
            return events + self._flush()
        codes = self._run[1:]
        if in_image and len(codes) in self.previews and all(map(words.is_code_id, codes)):
            events.append({"type": "image_preview", "codes": words.id_to_code(codes)})
        return events

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
        self._run, self._sent = [], 0
        return events

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
        new, self._sent = text[max(self._sent, start):end], max(self._sent, end)
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
            opened = any(_overlap(text, stop) for stop in self.stops)
            if self._first_stop(text, start) is None and not opened and not text.endswith(" "):
                break
            self._run.pop()
            self.ids.pop()

    def _unsettled(self, text: str) -> int:
        """Characters at the end of `text` that later tokens may still change."""
        half_character = len(text) - len(text.rstrip("\ufffd"))
        return max([half_character, *(_overlap(text, f"{blank}{stop}") for stop in self.stops for blank in ("", " "))])


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
