"""`SeedX` as a backend: its pictures have no codes, so clients send them again with every turn.

A request is one text as for every model. Written in the model's template (`[INST] … [/INST]\\n…`) it is that
conversation, and a picture in an answer is one that the model drew; any other text is continued as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from seed_multimodal.errors import RequestError
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.generation import room_for_answer
from seed_multimodal.language.seed_x import Box, ShownPicture, answer_text, read_boxes
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.serving.backend import Asked, Size, SystemBackend
from seed_multimodal.serving.codes_backend import left_out_notes
from seed_multimodal.serving.schema import FoundBox, GenerateRequest
from seed_multimodal.systems.chat import Content, DrawnPart

if TYPE_CHECKING:
    from seed_multimodal.language.prompts import PromptTemplate


class FeaturesSystem(SystemBackend):
    """A system that reads and writes features. Its pictures are kept whole: boxes and edits need them."""

    kept_bytes = 3

    def transform(self, image: Image.Image) -> Image.Image:
        return image

    @property
    def at_least(self) -> int:
        """See `Backend`."""
        return int(self.system.pictures.at_least or 0)

    def check(self, request: GenerateRequest, sizes: Sequence[Size | None], exact_original: bool) -> None:
        """See `Backend`."""
        words = self._words
        for number, item in enumerate(request.images):
            if isinstance(item, list) and item != words[:len(item)]:
                raise RequestError(f"images[{number}] holds codes, but the pictures of this model have none; send the "
                                   f"picture itself.")
        views = [item if size is None else ShownPicture(self.system.pictures.count_views(size))
                 for item, size in zip(request.images, sizes, strict=True)]
        contents, task = self._contents(request, views)
        room_for_answer(len(self.system.prompt_ids(contents, task)), self.system.llm)

    def ask(self, request: GenerateRequest, pictures: Sequence[Image.Image], exact_original: bool) -> Asked:
        """See `Backend`."""
        opened = iter(pictures)
        given: list[Any] = [item if isinstance(item, list) else next(opened) for item in request.images]
        contents, task = self._contents(request, given)
        opening = self.system.forced_opening(PLACEHOLDER in request.text) if request.force_boi and not task else ""
        asked = self.system.to_request(contents, opening, task)
        kept = [item if isinstance(item, list) else None for item in request.images]
        notes = left_out_notes(kept, len(self._words)) + [asked.note] * bool(asked.note)
        return Asked(asked.ids, opening, kept, request.force_boi, notes, asked)

    def draw(self, asked: Asked, part: ImagePart, request: GenerateRequest) -> Image.Image:
        assert asked.request is not None
        drawn = asked.request.paint([part], request.seed, {})[0]
        assert drawn is not None
        return drawn

    def boxes(self, asked: Asked, ids: list[int]) -> tuple[list[FoundBox], list[str]]:
        """The boxes of an answer on the last picture before it, and a sentence about each that is malformed."""
        text, grid = answer_text(ids, self.tokenizer), self.system.prompts.vocabulary.n_locations
        found, problems = read_boxes(text, asked.prompt[-1:] == [self.system.prompts.vocabulary.boxes], grid)
        if found and not asked.images_ids:
            return [], ["The answer holds boxes, but there is no picture that they could lie on."]
        return [FoundBox(len(asked.images_ids) - 1, _shares(box, grid)) for box in found], problems

    @property
    def _words(self) -> list[int]:
        """What stands for a whole picture that the model wrote, in the place of codes."""
        return list(range(self.tokenizer.vocabulary.tokens_per_image))

    def _contents(self, request: GenerateRequest, pictures: Sequence[Any]) -> tuple[list[Content], str]:
        """The conversation that a text says; the task is "text" for one that is none."""
        rest = iter(pictures)
        text = request.text.rstrip() if request.force_boi else request.text  # as next to every image word
        turns = read_turns(text, self.system.template) if self.system.spec.tuned else []
        if not turns:
            return [("user", list(self._items("user", text, rest)))], "text"
        return [(role, list(self._items(role, said, rest))) for role, said in turns], ""

    def _items(self, role: str, text: str, pictures: Iterator[Any]) -> Iterator[Any]:
        first, *spans = text.split(PLACEHOLDER)
        yield from [first] if first else []
        for span in spans:
            picture = next(pictures)
            if not isinstance(picture, list):
                image = picture if isinstance(picture, Image.Image) else None
                yield DrawnPart(self._words, image) if role == "assistant" else picture
            elif len(picture) == len(self._words):
                yield picture
            yield from [span] if span else []


def read_turns(text: str, template: PromptTemplate) -> list[tuple[str, str]]:
    """Role and words of each turn of a text in a template, up to where an answer begins; none where it is another."""
    before, *pieces = text.split(template.user_marker)
    if before.strip():
        return []
    turns = []
    for piece in pieces:
        said, closed, answer = piece.partition(template.user_suffix.strip())
        if not closed:
            return []
        turns += [("user", said.strip()), ("assistant", answer.strip())]
    return turns[:-1] if turns and not turns[-1][1] else []


def _shares(box: Box, grid: int) -> tuple[float, float, float, float]:
    """Left, top, right, bottom as shares of the picture's width and height."""
    edges = (box.x - box.width / 2, box.y - box.height / 2, box.x + box.width / 2, box.y + box.height / 2)
    left, top, right, bottom = (round(min(max(edge / grid, 0.0), 1.0), 6) for edge in edges)
    return left, top, right, bottom
