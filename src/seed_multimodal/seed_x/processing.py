"""SEED-X's prompts with images in several views, boxes as tokens, and parsing of answers.

    tuned (SEED-X-I, -Edit)   [INST] {image}{request} [/INST]\\n{answer}\\n[INST] {request} [/INST]\\n…
    base (SEED-X)             Question: {image}{question}\\nAnswer:   {image}{phrase} [[ <box_start>   {caption}

Each turn is encoded on its own, as in the training data. An image is `<patch>` … `</patch>` for each part of it and
`<img>` … `</img>` for the whole (`SeedXVocabulary.read_ids`). A box is `<box_start>`, the places of its centre (x, y),
its width and its height in 224ths of the image's, `<box_end>`. Source: SEED-X's original code (inference scripts,
`decode_llava_data`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.language.prompts import Part, get_template, merge_text
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import (
    BOX,
    BOX_END,
    BOX_WORDS,
    PLACEHOLDER,
    Ids,
    SeedXVocabulary,
)

GRID = SeedXVocabulary.n_locations
_NUMBER = re.compile(r"<loc-(\d+)>")
_WORD = re.compile(r"<[^>]*>")


@dataclass(frozen=True)
class InputImage:
    """An image that the model reads, as a part of a turn: in how many views (its parts and the whole)."""

    views: int


@dataclass(frozen=True)
class GeneratedImage:
    """An image of an earlier answer: its tokens, without features."""


Content = str | InputImage | GeneratedImage


class SeedXPrompts:
    """Prompts as token ids, starting with `<s>`."""

    def __init__(self, tokenizer: MultimodalTokenizer) -> None:
        self.tokenizer, self.vocabulary = tokenizer, seed_x_vocabulary(tokenizer)
        self.template = get_template("llama2")

    def completion(self, content: Sequence[Content], task: str = "ask") -> list[int]:
        """What the base model continues: a question, a phrase whose last words name what to find ("detect", the answer
        begins inside a box), a caption to draw ("draw"), or any text as it is ("chat")."""
        if task in ("ask", "describe"):
            return self._encode(["Question: ", *content, "\nAnswer:"])
        if task == "chat":
            return self._encode(content, asked=False)
        if task == "draw":
            return self._encode(content, rstrip=True)
        return [*self._encode([*content, " [[ "], rstrip=True), self.vocabulary.boxes]

    def dialogue(
        self, turns: Sequence[tuple[str, Sequence[Content]]], system: str = ""
    ) -> list[int]:
        """A conversation of a tuned model, up to where the next answer begins; `turns`: role and content, texts and
        images in order. Raises `RequestError` for a malformed box in a user's text."""
        spans: list[list[Part]] = [[f"{system}\n"]] if system else []
        for place, (role, content) in enumerate(turns):
            parts = list(self._parts(content, asked=role == "user"))
            spans.append(
                self.template.render_turn(role, parts, self.template.separator if place else "")
            )
        return [
            self.tokenizer.bos_id,
            *(id for span in spans for id in self.tokenizer.encode_parts(span)),
        ]

    def feature_positions(
        self, ids: Sequence[int], turns: Sequence[tuple[str, Sequence[Content]]]
    ) -> list[int]:
        """Where in the `ids` of a `dialogue` features are put: in the words of shown images, not of written ones."""
        shown = [
            isinstance(part, InputImage)
            for _, content in turns
            for part in content
            if not isinstance(part, str)
            for _ in range(part.views if isinstance(part, InputImage) else 1)
        ]
        return [
            place
            for number, place in enumerate(self.vocabulary.placeholder_positions(ids))
            if shown[number // self.vocabulary.tokens_per_image]
        ]

    def _encode(
        self, content: Sequence[Content], rstrip: bool = False, asked: bool = True
    ) -> list[int]:
        parts = merge_text(list(self._parts(content, asked)))
        if rstrip and parts and isinstance(parts[-1], str):  # a control word follows
            parts[-1] = parts[-1].rstrip()
        return self.tokenizer.encode_parts(parts, add_bos=True)

    def _parts(self, content: Sequence[Content], asked: bool = True) -> Iterator[Part]:
        """Texts, with their boxes as words, and images; in what is `asked` boxes must be whole."""
        for part in content:
            if isinstance(part, str):
                problems = read_boxes(part, grid=self.vocabulary.n_locations)[1] if asked else []
                if problems:
                    raise RequestError(problems[0])
                yield from box_parts(part, self.vocabulary)
            else:
                yield (
                    Ids(self.vocabulary.run())
                    if isinstance(part, GeneratedImage)
                    else (self.vocabulary.read_ids(part.views))
                )


def box_parts(text: str, vocabulary: SeedXVocabulary) -> list[str | Ids]:
    """A text as the parts of a prompt, its words of boxes as ids; raises `RequestError` for a location outside the
    grid."""
    parts: list[str | Ids] = []
    done, known = 0, vocabulary.added_tokens if BOX_WORDS.search(text) else {}
    for match in BOX_WORDS.finditer(text):
        names = re.findall("<[^>]+>", match[0])
        if wrong := [name for name in names if name not in known]:
            raise RequestError(
                f"{wrong[0]} lies outside the grid of {vocabulary.n_locations} places."
            )
        parts += [text[done : match.start()], Ids(known[name] for name in names)]
        done = match.end()
    return [part for part in [*parts, text[done:]] if part]


def seed_x_vocabulary(tokenizer: MultimodalTokenizer) -> SeedXVocabulary:
    """The vocabulary of SEED-X's tokenizer; raises `ConfigError` for another one's."""
    if not isinstance(tokenizer.vocabulary, SeedXVocabulary):
        raise ConfigError(
            "The tokenizer has no words for parts of images and boxes, so it is not SEED-X's."
        )
    return tokenizer.vocabulary


def insert_images(text: str, images: Sequence[int]) -> list[Content]:
    """Texts and images in order; `images` (views of each) take the places of `<image>`, or come first without any.
    Raises `RequestError` for another number of `<image>`s than images."""
    pieces = text.split(PLACEHOLDER)
    if len(pieces) == 1:
        return [*map(InputImage, images), text]
    if len(pieces) != len(images) + 1:
        raise RequestError(
            f"The text holds {len(pieces) - 1} {PLACEHOLDER} placeholders for {len(images)} images."
        )
    content: list[Content] = [pieces[0]]
    for views, piece in zip(images, pieces[1:], strict=True):
        content += [InputImage(views), piece]
    return [part for part in content if part != ""]


# ---- answers


def answer_text(ids: Iterable[int], tokenizer: MultimodalTokenizer) -> str:
    """Generated ids as the original `generate` writes them: without `<img>` and the image words of whole images;
    `</img>`, `</s>`, locations, box words and images that broke off stay."""
    words = seed_x_vocabulary(tokenizer)
    inside = words.run()[1:-1]
    shown: list[int] = []
    for id in ids:
        if id == words.eoi_id and shown[-len(inside) :] == inside:
            del shown[-len(inside) :]
        if id != words.boi_id:
            shown.append(id)
    return tokenizer.decode(shown)


def without_tags(text: str) -> str:
    """The displayed answer, as in the original scripts: without anything of the form `<…>`."""
    return _WORD.sub("", text)


@dataclass(frozen=True)
class Box:
    """A rectangle in 224ths of an image's width and height: its centre and its size."""

    x: int
    y: int
    width: int
    height: int

    @classmethod
    def from_corners(cls, corners: Sequence[float], size: tuple[int, int], grid: int = GRID) -> Box:
        """The box of a rectangle (left, top, right, bottom in pixels) in an image of `size` (width, height), to the
        nearest place of the grid."""
        left, top, right, bottom = corners
        shares = (
            (left + right) / 2 / size[0],
            (top + bottom) / 2 / size[1],
            (right - left) / size[0],
            (bottom - top) / size[1],
        )
        return cls(*(min(grid - 1, round(share * grid)) for share in shares))

    def corners(
        self, size: tuple[int, int], grid: int = GRID, clip: bool = True
    ) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in whole pixels of an image of this size, cut off at its edges (`clip`)."""
        across, down = self.width / grid * size[0] / 2, self.height / grid * size[1] / 2
        x, y = self.x / grid * size[0], self.y / grid * size[1]
        left, top, right, bottom = int(x - across), int(y - down), int(x + across), int(y + down)
        if clip:
            return max(0, left), max(0, top), min(size[0], right), min(size[1], bottom)
        return left, top, right, bottom

    def ids(self, words: SeedXVocabulary) -> Ids:
        """The box as words."""
        locations = (words.locations + place for place in (self.x, self.y, self.width, self.height))
        return Ids([words.boxes, *locations, words.boxes + 1])


def read_boxes(text: str, opened: bool = False, grid: int = GRID) -> tuple[list[Box], list[str]]:
    """The boxes of an answer with its words (`answer_text`), and a sentence about each that is malformed; `opened`: the
    prompt ended in `<box_start>`, so the text begins inside a box."""
    boxes: list[Box] = []
    problems: list[str] = []
    before, *pieces = (f"{BOX} {text}" if opened else text).split(BOX)
    for piece in pieces:
        inside, closed, _ = piece.partition(BOX_END)
        numbers = [int(number) for number in _NUMBER.findall(inside)]
        whole = (
            closed
            and len(numbers) == 4
            and max(numbers) < grid
            and not _NUMBER.sub("", inside).strip()
        )
        if whole and numbers[2] and numbers[3]:
            boxes.append(Box(*numbers))
        else:
            problems.append(
                f"A box is not four locations below {grid} with a width, a height and {BOX_END}: "
                f"{' '.join(inside.split())[:80]!r}."
            )
    if not pieces and BOX_END in before:
        problems.append(f"{BOX_END} stands without {BOX}.")
    return boxes, problems
