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

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.language.answer import AnswerReader, ImagePart
from seed_multimodal.language.prompts import Turn, get_template, merge_text
from seed_multimodal.language.text_tokenizer import Part, TextTokenizer
from seed_multimodal.language.vocabulary import BOX, BOX_END, BOX_WORDS, Ids, SeedXVocabulary

GRID = SeedXVocabulary.n_locations
_LOCATION = re.compile(r"<loc-(\d{1,9})>")
_TAG = re.compile(r"(?s)<[^>]*+>|(<.*)")  # what does not end is no tag


class InputImage(Ids):
    """The tokens of an image that the model reads; those of earlier answers are other `Ids`."""


class SeedXPrompts:
    """Prompts as token ids, starting with `<s>`, of texts and images as `Ids`."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = seed_x_vocabulary(tokenizer)
        self.template = get_template("llama2")

    def image(self, n_views: int) -> InputImage:
        """An input image; n_views: those of its parts, and of the complete image."""
        return InputImage(self.vocabulary.read_ids(n_views))

    def completion(self, content: Sequence[Part], task: str = "ask") -> list[int]:
        """The ids that the base model continues.

        task: "ask" and "describe": a question. "detect": a phrase whose last words name what to
            detect; the answer begins inside a box. "draw": a caption. Others: any text as it is.
        """
        if task in ("ask", "describe"):
            content = ["Question: ", *content, "\nAnswer:"]
        elif task == "detect":
            content = [*content, " [[ "]
        parts = merge_text(self._parts(content, task in ("ask", "describe", "draw", "detect")))
        if task in ("draw", "detect") and parts and isinstance(parts[-1], str):
            parts[-1] = parts[-1].rstrip()  # a control token follows
        ids = self.tokenizer.encode_parts(parts, add_bos=True)
        return [*ids, self.vocabulary.boxes] if task == "detect" else ids

    def dialogue(self, turns: Sequence[Turn], system: str = "") -> list[int]:
        """A conversation of a tuned model, up to where the next answer begins.

        Raises:
            RequestError: a malformed box in a user's text.
        """
        ids = list(self.tokenizer.start_ids)
        if system:
            ids += self.tokenizer.encode_parts([f"{system}\n"])
        turns = [(role, self._parts(content, role == "user")) for role, content in turns]
        # Turns are tokenized one by one, so that no token crosses their borders.
        for _, parts in self.template.render_turns(turns):
            ids += self.tokenizer.encode_parts(parts)
        return ids

    def feature_positions(self, ids: Sequence[int], turns: Sequence[Turn]) -> list[list[int]]:
        """Indices of the placeholder tokens of each input image."""
        positions = iter(self.vocabulary.placeholder_positions(ids))
        features: list[list[int]] = []
        for _, content in turns:
            for part in content:
                if isinstance(part, str):
                    continue
                count = len(self.vocabulary.placeholder_positions(part))
                image_positions = list(itertools.islice(positions, count))
                if isinstance(part, InputImage):
                    features.append(image_positions)
        return features

    def _parts(self, content: Sequence[Part], check_boxes: bool) -> list[Part]:
        """The content with boxes in its texts as ids; malformed ones may raise RequestError."""
        parts: list[Part] = []
        for part in content:
            if not isinstance(part, str):
                parts.append(part)
                continue
            _, problems = read_boxes(part, grid=self.vocabulary.n_locations)
            if check_boxes and problems:
                raise RequestError(problems[0])
            parts += box_parts(part, self.vocabulary)
        return parts


def with_repeated_images(
    turns: Iterable[tuple[str, Sequence[Any]]],
) -> Iterator[tuple[str, Sequence[Any]]]:
    """Turns with an answer's last image in front of the next question, if that has no image: edits
    of a drawing look like first ones."""
    answered: Sequence[Any] = ()  # the image of the answer before a question
    for role, content in turns:
        images = [part for part in content if not isinstance(part, str)]
        if role == "user" and not images:
            content = [*answered, *content]
        yield role, content
        answered = images[-1:] if role == "assistant" else ()


def box_parts(text: str, vocabulary: SeedXVocabulary) -> list[str | Ids]:
    """A text as the parts of a prompt, its box tokens as ids.

    Raises:
        RequestError: a location outside the grid.
    """
    parts: list[str | Ids] = []
    token_ids = vocabulary.added_tokens
    for index, piece in enumerate(re.split(f"({BOX_WORDS.pattern})", text)):
        if index % 2 == 0:  # between boxes
            parts.append(piece)
            continue
        names = re.findall("<[^>]+>", piece)
        for name in names:
            if name not in token_ids:
                raise RequestError(
                    f"{name} lies outside the grid of {vocabulary.n_locations} places."
                )
        parts.append(Ids(token_ids[name] for name in names))
    return [part for part in parts if part]


def seed_x_vocabulary(tokenizer: TextTokenizer) -> SeedXVocabulary:
    """The vocabulary of SEED-X's tokenizer; raises `ConfigError` for another one's."""
    if not isinstance(tokenizer.vocabulary, SeedXVocabulary):
        raise ConfigError(
            "The tokenizer has no tokens for parts of images and boxes, so it is not SEED-X's."
        )
    return tokenizer.vocabulary


# ---- answers


def answer_text(ids: Iterable[int], tokenizer: TextTokenizer) -> str:
    """Generated ids as text, as by the original `generate`.

    Without `<img>` and the tokens of complete images; `</img>`, `</s>`, locations, box tokens and
    incomplete images stay.
    """
    boi_id = seed_x_vocabulary(tokenizer).boi_id
    ids = list(ids)
    hidden = {index for index, id in enumerate(ids) if id == boi_id}
    for part in AnswerReader(tokenizer).read_all(ids).parts:
        if isinstance(part, ImagePart):
            hidden.update(part.positions)
    return tokenizer.decode(id for index, id in enumerate(ids) if index not in hidden)


def without_tags(text: str) -> str:
    """The displayed answer, as in the original scripts: without anything of the form `<…>`."""
    return _TAG.sub(r"\1", text)


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
