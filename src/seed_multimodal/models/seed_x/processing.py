"""SEED-X's prompts with images in several views, boxes as tokens, and parsing of answers.

    tuned (SEED-X-I, -Edit)   [INST] {image}{request} [/INST]\\n{answer}\\n[INST] {request} …
    base (SEED-X)             Question: {image}{question}\\nAnswer:
                              {image}{phrase} [[ <box_start>
                              {caption}

Each turn is encoded separately, as in the training data. An image is `<patch>` … `</patch>` for
each of its parts and `<img>` … `</img>` for the complete image (`SeedXVocabulary.read_ids`). A box
is `<box_start>`, four locations (its centre x, y, its width and its height in 224ths of the
image's), `<box_end>`.

Source: SEED-X's original code (inference scripts, `decode_llava_data`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.language.prompts import get_template, interleave, merge_text
from seed_multimodal.language.text_tokenizer import Part, TextTokenizer
from seed_multimodal.language.vocabulary import (
    BOX,
    BOX_END,
    BOX_WORDS,
    Ids,
    SeedXVocabulary,
)

GRID = SeedXVocabulary.n_locations
_LOCATION = re.compile(r"<loc-(\d+)>")
_TAG = re.compile(r"<[^>]*>")


@dataclass(frozen=True)
class InputImage:
    """An image that the model reads, as a part of a turn."""

    views: int  # those of its parts, and of the complete image


@dataclass(frozen=True)
class GeneratedImage:
    """An image of an earlier answer: its tokens, without features."""


Content = str | InputImage | GeneratedImage
Turn = tuple[str, Sequence[Content]]  # role, and texts and images in order


class SeedXPrompts:
    """Prompts as token ids, starting with `<s>`."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = seed_x_vocabulary(tokenizer)
        self.template = get_template("llama2")

    def completion(self, content: Sequence[Content], task: str = "ask") -> list[int]:
        """The ids that the base model continues.

        task: "ask" and "describe": a question. "detect": a phrase whose last words name what to
            detect; the answer begins inside a box. "draw": a caption. Others: any text as it is.
        """
        if task in ("ask", "describe"):
            return self._encode(["Question: ", *content, "\nAnswer:"])
        if task == "draw":
            return self._encode(content, rstrip=True)
        if task == "detect":
            return [*self._encode([*content, " [[ "], rstrip=True), self.vocabulary.boxes]
        return self._encode(content, check_boxes=False)

    def dialogue(self, turns: Sequence[Turn], system: str = "") -> list[int]:
        """A conversation of a tuned model, up to where the next answer begins.

        Raises:
            RequestError: a malformed box in a user's text.
        """
        ids = list(self.tokenizer.start_ids)
        if system:
            ids += self.tokenizer.encode_parts([f"{system}\n"])
        separator = ""
        # Turns are tokenized one by one, so that no token crosses their borders.
        for role, content in turns:
            parts = list(self._parts(content, check_boxes=role == "user"))
            turn = self.template.render_turn(role, parts, separator)
            ids += self.tokenizer.encode_parts(turn)
            separator = self.template.separator
        return ids

    def feature_positions(self, ids: Sequence[int], turns: Sequence[Turn]) -> list[int]:
        """Indices of the placeholder tokens of input images, not of generated ones."""
        # 1. Which views are input: a generated image has one, and no features.
        is_input: list[bool] = []
        for _, content in turns:
            for part in content:
                if isinstance(part, InputImage):
                    is_input += [True] * part.views
                elif isinstance(part, GeneratedImage):
                    is_input.append(False)

        # 2. The placeholders of these views; every view has equally many.
        positions: list[int] = []
        for index, position in enumerate(self.vocabulary.placeholder_positions(ids)):
            if is_input[index // self.vocabulary.tokens_per_image]:
                positions.append(position)
        return positions

    def _encode(
        self, content: Sequence[Content], rstrip: bool = False, check_boxes: bool = True
    ) -> list[int]:
        parts = merge_text(list(self._parts(content, check_boxes)))
        if rstrip and parts and isinstance(parts[-1], str):  # a control token follows
            parts[-1] = parts[-1].rstrip()
        return self.tokenizer.encode_parts(parts, add_bos=True)

    def _parts(self, content: Sequence[Content], check_boxes: bool = True) -> Iterator[Part]:
        """Texts, with their boxes as ids, and images as ids.

        check_boxes: malformed boxes raise `RequestError`.
        """
        for part in content:
            if isinstance(part, str):
                if check_boxes:
                    _, problems = read_boxes(part, grid=self.vocabulary.n_locations)
                    if problems:
                        raise RequestError(problems[0])
                yield from box_parts(part, self.vocabulary)
            elif isinstance(part, GeneratedImage):
                yield Ids(self.vocabulary.run())
            else:
                yield self.vocabulary.read_ids(part.views)


def box_parts(text: str, vocabulary: SeedXVocabulary) -> list[str | Ids]:
    """A text as the parts of a prompt, its box tokens as ids.

    Raises:
        RequestError: a location outside the grid.
    """
    if not BOX_WORDS.search(text):
        return [text] if text else []
    token_ids = vocabulary.added_tokens
    parts: list[str | Ids] = []
    end = 0  # of the last box
    for match in BOX_WORDS.finditer(text):
        ids: list[int] = []
        for name in re.findall("<[^>]+>", match[0]):
            if name not in token_ids:
                raise RequestError(
                    f"{name} lies outside the grid of {vocabulary.n_locations} places."
                )
            ids.append(token_ids[name])
        # The text since the last box, and this one.
        parts.append(text[end : match.start()])
        parts.append(Ids(ids))
        end = match.end()
    parts.append(text[end:])
    return [part for part in parts if part]


def seed_x_vocabulary(tokenizer: TextTokenizer) -> SeedXVocabulary:
    """The vocabulary of SEED-X's tokenizer; raises `ConfigError` for another one's."""
    if not isinstance(tokenizer.vocabulary, SeedXVocabulary):
        raise ConfigError(
            "The tokenizer has no tokens for parts of images and boxes, so it is not SEED-X's."
        )
    return tokenizer.vocabulary


def insert_images(text: str, views: Sequence[int]) -> list[Content]:
    """`interleave` for images of these numbers of views."""
    images: list[Content] = [InputImage(n_views) for n_views in views]
    return interleave(text, images)


# ---- answers


def answer_text(ids: Iterable[int], tokenizer: TextTokenizer) -> str:
    """Generated ids as text, as by the original `generate`.

    Without `<img>` and the tokens of complete images; `</img>`, `</s>`, locations, box tokens and
    incomplete images stay.
    """
    vocabulary = seed_x_vocabulary(tokenizer)
    image_tokens = vocabulary.run()[1:-1]
    n_image_tokens = len(image_tokens)
    text_ids: list[int] = []
    for id in ids:
        # An image's end: its tokens are dropped if all of them precede it.
        if id == vocabulary.eoi_id and text_ids[-n_image_tokens:] == image_tokens:
            del text_ids[-n_image_tokens:]
        if id != vocabulary.boi_id:
            text_ids.append(id)
    return tokenizer.decode(text_ids)


def without_tags(text: str) -> str:
    """The displayed answer, as in the original scripts: without anything of the form `<…>`."""
    return _TAG.sub("", text)


@dataclass(frozen=True)
class Box:
    """A rectangle in 224ths of an image's width and height: its centre and its size."""

    x: int
    y: int
    width: int
    height: int

    @classmethod
    def from_corners(cls, corners: Sequence[float], size: tuple[int, int], grid: int = GRID) -> Box:
        """The box of a rectangle, rounded to the grid.

        corners: left, top, right, bottom in pixels.
        size: width and height of the image.
        """
        left, top, right, bottom = corners
        width, height = size
        # Centre and size as fractions of the image.
        fractions = (
            (left + right) / 2 / width,
            (top + bottom) / 2 / height,
            (right - left) / width,
            (bottom - top) / height,
        )
        return cls(*(min(grid - 1, round(fraction * grid)) for fraction in fractions))

    def corners(
        self, size: tuple[int, int], grid: int = GRID, clip: bool = True
    ) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels of an image of this size.

        size: width and height.
        clip: cut off at the image's edges.
        """
        width, height = size
        x = self.x / grid * width
        y = self.y / grid * height
        half_width = self.width / grid * width / 2
        half_height = self.height / grid * height / 2
        # Corners are truncated, not rounded.
        left = int(x - half_width)
        top = int(y - half_height)
        right = int(x + half_width)
        bottom = int(y + half_height)
        if clip:
            return max(0, left), max(0, top), min(width, right), min(height, bottom)
        return left, top, right, bottom

    def ids(self, vocabulary: SeedXVocabulary) -> Ids:
        """The box as tokens."""
        values = (self.x, self.y, self.width, self.height)
        locations = [vocabulary.locations + value for value in values]
        return Ids([vocabulary.boxes, *locations, vocabulary.boxes + 1])


def read_boxes(text: str, opened: bool = False, grid: int = GRID) -> tuple[list[Box], list[str]]:
    """The boxes of an answer, and a sentence about each malformed one.

    text: with box tokens, see `answer_text`.
    opened: the prompt ended in `<box_start>`, so the text begins inside a box.
    """
    boxes: list[Box] = []
    problems: list[str] = []
    if opened:
        text = f"{BOX} {text}"
    # Each piece follows a `<box_start>`: four locations up to `<box_end>`, then any text.
    before, *pieces = text.split(BOX)
    for piece in pieces:
        content, end, _ = piece.partition(BOX_END)
        locations = [int(location) for location in _LOCATION.findall(content)]
        has_other_text = bool(_LOCATION.sub("", content).strip())
        is_complete = bool(end) and len(locations) == 4 and not has_other_text
        # Widths and heights of 0 are malformed, too.
        if is_complete and max(locations) < grid and min(locations[2:]) > 0:
            boxes.append(Box(*locations))
        else:
            problems.append(
                f"A box is not four locations below {grid} with a width, a height and {BOX_END}: "
                f"{' '.join(content.split())[:80]!r}."
            )
    if not pieces and BOX_END in before:
        problems.append(f"{BOX_END} stands without {BOX}.")
    return boxes, problems
