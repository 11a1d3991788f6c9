"""An answer's tokens → texts and images in order, at once or as events while it is generated.

An image is `least_codes` to `tokens_per_image` codes between `<img>` and `</img>` (optional if their number is
variable); a malformed image becomes a `BrokenImagePart`, and parsing continues.

Events: `{"type": "text", "text": …}`, `{"type": "image_start"}`, `{"type": "image", "image": PIL, "codes": […]}`,
`{"type": "image_broken", "reason": …}`, and last `{"type": "done", "answer": Answer}`; where previews are asked for,
`{"type": "image_preview", "image": PIL, "codes": […]}` with the first codes of an image and what they show.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import ImageVocabulary

Event = dict[str, Any]


@dataclass(frozen=True)
class TextPart:
    """Text of the answer, decoded without special tokens."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """A complete image: its codes, all inside the codebook (for SEED-X: placeholder indices), and the index of the
    first one in the generated ids."""

    codes: list[int]
    place: int = field(default=0, compare=False, kw_only=True)


@dataclass(frozen=True)
class BrokenImagePart:
    """Malformed image tokens: the generated ids (including image start and end) and the reason."""

    ids: list[int]
    reason: str


AnswerPart = TextPart | ImagePart | BrokenImagePart


def split_answer(ids: Iterable[int], tokenizer: MultimodalTokenizer) -> list[AnswerPart]:
    """The parts of generated ids (without the prompt), up to the first `</s>`; white space alone is dropped."""
    return AnswerReader(tokenizer).read_all(ids).parts


class AnswerReader:
    """Reads an answer token by token; `ids` are the tokens that belong to it so far, `parts` what they show.

    It ends at `</s>` or where the text holds one of `stops`. Text is held back while its end may be incomplete: half a
    character, or the first letters of a stop. `previews`: after how many codes of an image there is an event with them;
    `after`: text up to and including these characters is a verdict, without stops and events.
    """

    def __init__(self, tokenizer: MultimodalTokenizer, stops: Sequence[str] = (), previews: Sequence[int] = (),
                 after: str = "") -> None:
        self.tokenizer, self.stops, self.previews, self.after = tokenizer, tuple(filter(None, stops)), previews, after
        self.ids: list[int] = []
        self.parts: list[AnswerPart] = []
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

    def read_all(self, tokens: Iterable[int]) -> AnswerReader:
        """Add a whole answer."""
        for token in tokens:
            self.read(int(token))
        self.close()
        return self

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
        run, words = self._run, self.tokenizer.vocabulary
        if not run or not words.is_image_word(run[0]):
            events = self._new_text(final=True) if run else []
            text = self.tokenizer.decode(run, skip_special_tokens=True)
            self.parts += [TextPart(text)] if text.strip() else []
            self._run, self._sent = [], 0
            return events
        start, end = len(self.ids) - len(run), len(run)
        if run[0] != words.boi_id or run[-1] != words.eoi_id:  # texts inside belong to the image only if it is closed
            end = next((place for place in range(1, end) if not words.is_code_id(run[place])), end)
        part = _image_part(run[:end], words, start)
        self.parts.append(part)
        self._run, self.ids = [], self.ids[:start + end]
        events = [{"type": "image_broken", "reason": part.reason} if isinstance(part, BrokenImagePart) else
                  {"type": "image", "part": part, "codes": list(part.codes)}]
        for token in run[end:]:
            events += self.read(token)
        return events + self._flush()

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


def _image_part(ids: list[int], vocabulary: ImageVocabulary, start: int) -> ImagePart | BrokenImagePart:
    least, wanted = vocabulary.least_codes, vocabulary.tokens_per_image
    opened, closed = ids[0] == vocabulary.boi_id, ids[-1] == vocabulary.eoi_id
    inside = ids[int(opened):len(ids) - int(closed)]
    if not opened:
        return BrokenImagePart(ids, "Image words without an opening <img>.")
    if not closed and least == wanted:
        return BrokenImagePart(ids, f"An image broke off after {len(inside)} of {wanted} codes.")
    if not all(vocabulary.is_code_id(id) for id in inside):
        return BrokenImagePart(ids, "An image holds words that are no image codes.")
    if not least <= len(inside) <= wanted:
        return BrokenImagePart(ids, f"An image has {len(inside)} codes instead of {wanted}.")
    codes = vocabulary.id_to_code(inside)
    if vocabulary.in_order and codes != list(range(wanted)):
        return BrokenImagePart(ids, "The words of an image are not in their order.")
    return ImagePart(codes, place=start + 1)


def _overlap(text: str, stop: str) -> int:
    """The longest beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
