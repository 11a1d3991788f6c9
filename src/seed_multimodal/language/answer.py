"""An answer's tokens → texts and images in order, at once or as events while it is generated.

An image is `min_codes` to `tokens_per_image` codes between `<img>` and `</img>` (optional if their
number is variable); a malformed image becomes a `BrokenImagePart`, and parsing continues.

Events: `{"type": "text", "text": …}`, before it `reasoning` (see `Answer`) in the same form;
`{"type": "image_start"}`, `{"type": "image", "image": PIL, "codes": […], "part": ImagePart}`,
`{"type": "image_broken", "reason": …}`, and last `{"type": "done", "answer": Answer, "notes":
[…]}`; where previews are requested, `{"type": "image_preview", "image": PIL, "codes": […]}` with
the first codes of an image and what they show. Drawings of several images have an `index`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Required, TypedDict

from PIL import Image

from seed_multimodal.language.prompts import merge_text, split_verdict
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import PLACEHOLDER, ImageGrammar, ImageVocabulary

_NOT_BLANK = re.compile(r"\S")
LEFT_OUT = re.compile(r"The first \d+ messages were left out: [^.:]*+\. ?")


def left_out_note(n_messages: int, limit: str) -> str:
    """A note that `LEFT_OUT` matches; `limit`: what is read at most."""
    return f"The first {n_messages} messages were left out: at most {limit} are read."


@dataclass
class ImagePart:
    """A complete image.

    codes: all inside the codebook; of SEED-X the indices of its placeholders.
    position: index of the first code in the generated ids.
    image: the decoded image, if it was decoded.
    """

    codes: list[int]
    position: int = field(default=0, compare=False, kw_only=True)
    image: Image.Image | None = field(default=None, compare=False, kw_only=True)

    @property
    def positions(self) -> range:
        """Indices of the codes in the generated ids."""
        return range(self.position, self.position + len(self.codes))

    @property
    def description(self) -> str:
        """What the system says that it has drawn, with `read_back`; else empty."""
        return "" if self.image is None else self.image.info.get("description", "")


@dataclass(frozen=True)
class BrokenImagePart:
    """Malformed image tokens: the generated ids (including image start and end) and the reason."""

    ids: list[int]
    reason: str


@dataclass(frozen=True)
class ReasoningPart:
    """What the model wrote before its answer (see `TaskPrompts`), and what ended it."""

    text: str
    end: str


@dataclass(frozen=True)
class PrefacePart:
    """What the system puts before the model's answer."""

    text: str


# A text is decoded without special tokens.
AnswerPart = str | ImagePart | BrokenImagePart | ReasoningPart | PrefacePart


@dataclass(frozen=True)
class Answer:
    """One answer of the model: its texts and images in order, and views of them."""

    parts: Sequence[AnswerPart]
    ids: Sequence[int] = ()  # the generated tokens
    # Sentences about the request and the answer, see `pipelines.tasks`.
    notes: Sequence[str] = field(default=(), compare=False)
    prompt_tokens: int = field(default=0, compare=False)  # of `chat`
    # "stop"; "length": no end within the tokens; "cancelled"
    finish_reason: str = field(default="stop", compare=False)

    @property
    def note(self) -> str:
        """All notes."""
        return " ".join(self.notes)

    @property
    def reasoning(self) -> str:
        """What the model wrote before the answer: a verdict (see `TaskPrompts`), or nothing."""
        return " ".join(part.text for part in self.parts if isinstance(part, ReasoningPart))

    @property
    def written(self) -> list[str | ImagePart | BrokenImagePart]:
        """What the model wrote, verdicts too, but no preface."""
        written: list[str | ImagePart | BrokenImagePart] = []
        for part in self.parts:
            if isinstance(part, ReasoningPart):
                written.append(part.text + part.end)
            elif not isinstance(part, PrefacePart):
                written.append(part)
        return merge_text(written)

    @property
    def text(self) -> str:
        """All text, without images."""
        return " ".join(part for part in self.shown if isinstance(part, str))

    @property
    def shown(self) -> list[str | ImagePart | BrokenImagePart]:
        """Texts, without white space around them, and images."""
        shown: list[str | ImagePart | BrokenImagePart] = []
        for part in self.parts:
            if isinstance(part, str | PrefacePart):
                shown.append((part if isinstance(part, str) else part.text).strip())
            elif not isinstance(part, ReasoningPart):
                shown.append(part)
        return shown

    @property
    def images(self) -> list[Image.Image]:
        """All images that were drawn."""
        return [
            part.image
            for part in self.parts
            if isinstance(part, ImagePart) and part.image is not None
        ]

    @property
    def codes(self) -> list[list[int]]:
        """The codes of every complete image."""
        return [list(part.codes) for part in self.parts if isinstance(part, ImagePart)]

    @property
    def problems(self) -> list[str]:
        """A message for each broken image."""
        return [part.reason for part in self.parts if isinstance(part, BrokenImagePart)]

    def __str__(self) -> str:
        """The text with `<image>` in place of images."""
        return " ".join(part if isinstance(part, str) else PLACEHOLDER for part in self.shown)


class Event(TypedDict, total=False):
    """One step of an answer."""

    type: Required[
        Literal[
            "text", "reasoning", "image_start", "image_preview", "image", "image_broken", "done"
        ]
    ]
    text: str
    codes: list[int]
    image: Image.Image | None
    part: ImagePart
    reason: str
    answer: Answer
    notes: list[str]
    index: int


class _RunningText:
    """The text of tokens that come one by one; only the last ones are decoded again.

    text: of all tokens; half a character at its end is "\ufffd".
    lengths: of the text after each token.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.text = ""
        self.lengths: list[int] = []
        self._tokenizer = tokenizer
        # The tokens whose text is not certain, behind those that were certain last: a tokenizer
        # may decode the beginning of a text in another way (LLaMA's drops a space).
        self._known_ids: list[int] = []
        self._new_ids: list[int] = []
        self._known = ""  # the text of `_known_ids` alone
        self._n_certain = 0  # characters

    def add(self, token: int) -> None:
        """Add a token."""
        self._new_ids.append(token)
        ids = [*self._known_ids, *self._new_ids]
        decoded = self._tokenizer.decode(ids, skip_special_tokens=True)
        new_text = decoded[len(self._known) :]
        self.text = self.text[: self._n_certain] + new_text
        self.lengths.append(len(self.text))
        if new_text and not new_text.endswith("\ufffd"):
            self._known_ids = self._new_ids
            self._new_ids = []
            self._known = self._tokenizer.decode(self._known_ids, skip_special_tokens=True)
            self._n_certain = len(self.text)


class AnswerReader:
    """Parses an answer token by token.

    stops: texts that end the answer, as `</s>` does. A stop of white space only counts after the
    first word. The end of a text is held back while it may be half a character or half a stop.
    previews: numbers of codes after which there is an event with the image so far.
    stop_after, answer_after: see `GenerationSettings`; no text is sent before they are there.
    n_opening: so many tokens at the beginning are not the model's: stops begin behind them.
    vocabulary: with another number of codes of an image than the tokenizer's.

    ids: the tokens that belong to the answer so far. parts: its complete texts and images.
    found_stop: whether one of `stops` has ended the answer.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        stops: Sequence[str] = (),
        previews: Sequence[int] = (),
        stop_after: str = "",
        n_opening: int = 0,
        vocabulary: ImageVocabulary | None = None,
        answer_after: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary or tokenizer.vocabulary
        self.previews = previews
        self.stop_after = stop_after
        self.answer_after = answer_after
        self.ids: list[int] = []
        self.parts: list[AnswerPart] = []
        self.finished = False
        self.found_stop = False
        self._run: list[int] = []  # tokens since the last change between text and image
        self._grammar = ImageGrammar(self.vocabulary)  # whether the run is an open image
        self._is_image = False  # whether it is an image, or image tokens without its start
        self._n_opening = n_opening  # tokens that are still to come
        self._stops_from = 0  # characters of the run's text that are the opening's
        self._text = _RunningText(tokenizer)  # of the run
        self._sent = 0  # characters of the run's text that were events already
        self._n_verdict = 0  # those of them before the answer

        stops = [stop for stop in stops if stop]
        self._prefixes = [""]
        for stop in stops:
            self._prefixes += [stop[:length] for length in range(1, len(stop) + 1)]
        self._stop = re.compile("|".join(map(re.escape, stops)) or "(?!)")  # nothing matches

    def read(self, token: int) -> list[Event]:
        """Add one token and return the events it completes; an image's has its `ImagePart`."""
        vocabulary = self.vocabulary
        in_image = self._grammar.n_in_image is not None
        is_opening = self._n_opening > 0
        if is_opening:
            self._n_opening -= 1
        if self.finished or (in_image and vocabulary.is_ignored_in_image(token)):
            return []

        # 1. The token ends the answer, or the run before it; a text inside an image waits for the
        #    image's end.
        events: list[Event] = []
        is_end = token in self.tokenizer.eos_token_ids
        is_image_token = vocabulary.is_image_token(token)
        is_change = bool(self._run) and not in_image and is_image_token != self._is_image
        if is_end or is_change or token == vocabulary.boi_id:
            events += self._flush()
        if is_end:
            if not self.finished:  # else a stop has dropped the end of the answer
                self.ids.append(token)
            self.finished = True
            return events
        if token == vocabulary.boi_id:
            events.append({"type": "image_start"})

        # 2. It continues the run, and may complete a text event or an image.
        if not self._run:
            self._is_image = is_image_token
        self._grammar.feed(token)
        self.ids.append(token)
        self._run.append(token)
        if not self._is_image:
            self._text.add(token)
            if is_opening:
                self._stops_from = len(self._text.text.rstrip("\ufffd"))
            return events + self._new_text(final=False)
        if token == vocabulary.eoi_id:
            return events + self._flush()
        return events + self._preview()

    def _preview(self) -> list[Event]:
        """The unfinished image, where a preview is due."""
        vocabulary = self.vocabulary
        codes = self._run[1:]
        in_image = self._grammar.n_in_image is not None
        is_due = in_image and len(codes) in self.previews
        if not is_due or not all(map(vocabulary.is_code_id, codes)):
            return []
        codes = [id - vocabulary.code_start for id in codes]
        return [{"type": "image_preview", "codes": codes}]

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
        if not self._run or not self._is_image:
            return self._flush_text()

        # 1. Texts inside belong to the image only if it is closed.
        vocabulary = self.vocabulary
        run = self._run
        start = len(self.ids) - len(run)
        end = len(run)
        if run[0] != vocabulary.boi_id or run[-1] != vocabulary.eoi_id:
            end = 1
            while end < len(run) and vocabulary.is_code_id(run[end]):
                end += 1

        # 2. The image, complete or broken.
        part = _image_part(run[:end], vocabulary, start)
        self.parts.append(part)
        self._run = []
        self._grammar.n_in_image = None
        self.ids = self.ids[: start + end]
        events: list[Event]
        if isinstance(part, BrokenImagePart):
            events = [{"type": "image_broken", "reason": part.reason}]
        else:
            events = [{"type": "image", "part": part, "codes": list(part.codes)}]

        # 3. What follows the image tokens, as of a broken image, is parsed again.
        for token in run[end:]:
            events += self.read(token)
        return events + self._flush()

    def _flush_text(self) -> list[Event]:
        """End a text; its part is what the events told."""
        events = [] if self.finished else self._new_text(final=True)
        verdict = self._text.text[: self._n_verdict]
        if verdict:
            reasoning = verdict.removesuffix(self.answer_after)
            self.parts.append(ReasoningPart(reasoning, verdict.removeprefix(reasoning)))
        text = self._text.text[self._n_verdict : self._sent]
        if text.strip():
            self.parts.append(text)
        self._run = []
        self._text = _RunningText(self.tokenizer)
        self._sent = 0
        self._n_verdict = 0
        self._stops_from = 0
        return events

    def _new_text(self, final: bool) -> list[Event]:
        """What the run adds to the text; a stop ends the answer, and is dropped."""
        text = self._text.text

        # 1. Skip the verdict.
        start = 0
        if self.stop_after and self.stop_after in text:
            start = text.find(self.stop_after) + len(self.stop_after)
        elif self.stop_after and not final:
            return []

        # 2. The text that is certain ends at a stop, or at what may become a stop or a character.
        #    Neither begins in what was sent.
        unsent = self._sent
        stops_from = max(unsent, start, self._stops_from)
        stop = self._find_stop(text, start, stops_from)
        end = len(text)
        if stop is not None:
            end = stops_from + len(text[stops_from : stop.start()].rstrip(" "))
            self._drop_run_after(end)
            self.found_stop = True
            self.finished = True
        elif not final:
            certain = text[stops_from:].rstrip("\ufffd")
            prefix = max(filter(certain.endswith, self._prefixes), key=len)
            end = stops_from + len(certain.removesuffix(prefix).rstrip(" "))

        # 3. What of it was no event yet; the first text waits for what may be behind a verdict.
        events: list[Event] = []
        if self.answer_after and not unsent:
            is_over = final or stop is not None
            if not is_over and not text[:end].partition(self.answer_after)[2]:
                return []
            reasoning, answer = split_verdict(text[:end], self.answer_after)
            unsent = self._n_verdict = end - len(answer)
            if reasoning:
                events.append({"type": "reasoning", "text": reasoning})
        self._sent = max(unsent, end)
        if unsent < end:
            events.append({"type": "text", "text": text[unsent:end]})
        return events

    def _drop_run_after(self, end: int) -> None:
        """Drop the run's tokens that reach behind this length of its text."""
        n_kept = len(self._run)
        while n_kept and (not end or self._text.lengths[n_kept - 1] > end):
            n_kept -= 1
        del self.ids[len(self.ids) - len(self._run) + n_kept :]
        del self._run[n_kept:]

    def _find_stop(self, text: str, start: int, stops_from: int) -> re.Match[str] | None:
        """The first stop behind `stops_from`; line breaks before the first word are none.

        start: where the text begins, behind a verdict.
        """
        first_word = _NOT_BLANK.search(text, start)
        for stop in self._stop.finditer(text, stops_from):
            is_blank = not stop[0].strip()
            if not is_blank or (first_word and stop.start() > first_word.start()):
                return stop
        return None


def _image_part(
    ids: list[int], vocabulary: ImageVocabulary, start: int
) -> ImagePart | BrokenImagePart:
    """Check the tokens of an image; `start`: their index in the generated ids."""
    # 1. What stands between `<img>` and `</img>`; a broken image may lack either.
    min_codes = vocabulary.min_codes
    max_codes = vocabulary.tokens_per_image
    opened = ids[0] == vocabulary.boi_id
    closed = ids[-1] == vocabulary.eoi_id
    content = ids[int(opened) : len(ids) - int(closed)]
    codes = [id - vocabulary.code_start for id in content if vocabulary.is_code_id(id)]
    wrong_order = vocabulary.fixed_image_order and codes != list(range(max_codes))

    # 2. The first thing that is wrong.
    reason = ""
    if not opened:
        reason = "Image tokens without an opening <img>."
    elif not closed and min_codes == max_codes:
        reason = f"An image broke off after {len(content)} of {max_codes} codes."
    elif not min_codes <= len(content) <= max_codes:
        reason = f"An image has {len(content)} codes instead of {max_codes}."
    elif len(codes) < len(content) or wrong_order:
        reason = "An image holds other tokens than its codes in their order."
    if reason:
        return BrokenImagePart(ids, reason)
    return ImagePart(codes, position=start + 1)
