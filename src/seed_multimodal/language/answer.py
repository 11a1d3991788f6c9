"""An answer's tokens → texts and images in order, at once or as events while it is generated.

An image is `min_codes` to `tokens_per_image` codes between `<img>` and `</img>` (optional if their number is
variable); a malformed image becomes a `BrokenImagePart`, and parsing continues.

Events: `{"type": "text", "text": …}`, `{"type": "image_start"}`, `{"type": "image", "image": PIL, "codes": […]}`,
`{"type": "image_broken", "reason": …}`, and last `{"type": "done", "answer": Answer}`; where previews are asked for,
`{"type": "image_preview", "image": PIL, "codes": […]}` with the first codes of an image and what they show.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import ImageVocabulary

Event = dict[str, Any]


@dataclass
class ImagePart:
    """A whole image: its codes, all inside the codebook (of SEED-X the numbers of its places), where in the generated
    ids the first of them stands, and the image itself if it was drawn."""

    codes: list[int]
    position: int = field(default=0, compare=False, kw_only=True)
    image: Image.Image | None = field(default=None, compare=False, kw_only=True)


@dataclass(frozen=True)
class BrokenImagePart:
    """Malformed image tokens: the generated ids (including image start and end) and the reason."""

    ids: list[int]
    reason: str


AnswerPart = str | ImagePart | BrokenImagePart  # a text is decoded without special tokens


class AnswerReader:
    """Reads an answer token by token; `ids` are the tokens that belong to it so far, `parts` what they show.

    It ends at `</s>` or where the text holds one of `stops` (one of white space only behind the text's first word).
    Text is held back while its end may be incomplete: half a character, or the first letters of a stop.

    `previews`: after how many codes of an image there is an event with them; `after`: text up to and including these
    characters is a verdict, without stops and events.
    """

    def __init__(
        self,
        tokenizer: MultimodalTokenizer,
        stops: Sequence[str] = (),
        previews: Sequence[int] = (),
        after: str = "",
    ) -> None:
        self.tokenizer, self.previews, self.after = tokenizer, previews, after
        stops = [stop for stop in stops if stop]
        begun = [stop[:length] for stop in stops for length in range(len(stop), 0, -1)]
        self._stop = re.compile(f" *(?:{'|'.join(map(re.escape, stops)) or '(?!)'})")
        self._held = re.compile(rf" *(?:{'|'.join(map(re.escape, begun))})?\Z|\ufffd+\Z")
        self.ids: list[int] = []
        self.parts: list[AnswerPart] = []
        self.finished = False
        self._run: list[int] = []  # tokens since the last change between text and image
        self._sent = 0  # characters of the run's text that were events already

    def read(self, token: int) -> list[Event]:
        """Add one token and return the events it completes; an image's event holds its `ImagePart`."""
        words, first = self.tokenizer.vocabulary, self._run[:1]
        in_image = first == [words.boi_id]
        if self.finished or (in_image and words.is_ignored_in_image(token)):
            return []
        if token == self.tokenizer.eos_id:
            events = self._flush()
            self.ids += [] if self.finished else [token]
            self.finished = True
            return events
        changes = not in_image and any(
            words.is_image_token(token) != words.is_image_token(one) for one in first
        )
        events = self._flush() if changes or token == words.boi_id else []
        if token == words.boi_id:
            events.append({"type": "image_start"})
        self.ids.append(token)
        self._run.append(token)
        if not words.is_image_token(self._run[0]):
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

    def _flush(self) -> list[Event]:
        """End the present run and return its content."""
        run, words = self._run, self.tokenizer.vocabulary
        if not run or not words.is_image_token(run[0]):
            events = self._new_text(final=True) if run else []
            text = self._text()
            self.parts += [text] if text.strip() else []
            self._run, self._sent = [], 0
            return events
        start, end = len(self.ids) - len(run), len(run)
        if (
            run[0] != words.boi_id or run[-1] != words.eoi_id
        ):  # texts inside belong to the image only if it is closed
            end = next((place for place in range(1, end) if not words.is_code_id(run[place])), end)
        part = _image_part(run[:end], words, start)
        self.parts.append(part)
        self._run, self.ids = [], self.ids[: start + end]
        events = [
            {"type": "image_broken", "reason": part.reason}
            if isinstance(part, BrokenImagePart)
            else {"type": "image", "part": part, "codes": list(part.codes)}
        ]
        for token in run[end:]:
            events += self.read(token)
        return events + self._flush()

    def _text(self) -> str:
        return self.tokenizer.decode(self._run, skip_special_tokens=True)

    def _new_text(self, final: bool) -> list[Event]:
        """What the run adds to the text; a stop ends the answer, and is dropped."""
        text = self._text()
        start = text.find(self.after) + len(self.after) if self.after and self.after in text else 0
        if self.after and not start and not final:
            return []
        stop = self._find_stop(text, start)
        held = None if final else self._held.search(text)
        end = stop.start() if stop else held.start() if held else len(text)
        while stop and self._run and (not end or len(self._text()) > end):
            self._run.pop()
            self.ids.pop()
        self.finished = self.finished or stop is not None
        new, self._sent = text[max(self._sent, start) : end], max(self._sent, end)
        return [{"type": "text", "text": new}] if new else []

    def _find_stop(self, text: str, start: int) -> re.Match[str] | None:
        """The first stop behind `start`; line breaks before the first word are none."""
        first_word = re.compile(r"\S").search(text, start)
        for stop in self._stop.finditer(text, start):
            is_blank = not stop[0].strip()
            if not is_blank or (first_word and stop.start() > first_word.start()):
                return stop
        return None


def _image_part(ids: list[int], words: ImageVocabulary, start: int) -> ImagePart | BrokenImagePart:
    least, wanted = words.min_codes, words.tokens_per_image
    opened, closed, reason = ids[0] == words.boi_id, ids[-1] == words.eoi_id, ""
    inside = ids[int(opened) : len(ids) - int(closed)]
    codes = [id - words.code_start for id in inside if words.is_code_id(id)]
    if not opened:
        reason = "Image words without an opening <img>."
    elif not closed and least == wanted:
        reason = f"An image broke off after {len(inside)} of {wanted} codes."
    elif not least <= len(inside) <= wanted:
        reason = f"An image has {len(inside)} codes instead of {wanted}."
    elif len(codes) < len(inside) or (words.fixed_image_order and codes != list(range(wanted))):
        reason = "An image holds other words than its codes in their order."
    return BrokenImagePart(ids, reason) if reason else ImagePart(codes, position=start + 1)
