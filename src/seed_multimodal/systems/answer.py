"""A system's answer: texts and drawn pictures in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from seed_multimodal.language.answer import AnswerPart, BrokenImagePart, ImagePart, TextPart
from seed_multimodal.language.vocabulary import PLACEHOLDER


@dataclass(frozen=True)
class DrawnPart(ImagePart):
    """A picture of the answer: its codes, and the picture itself unless the system has no de-tokenizer."""

    image: Image.Image | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Answer:
    """One answer of the model.

    `parts` holds `TextPart`, `DrawnPart` and `BrokenImagePart` (image words that are no picture, with the reason) in
    order; the properties are views of it. `ids` are the generated tokens.
    """

    parts: Sequence[AnswerPart]
    ids: Sequence[int] = ()

    @property
    def text(self) -> str:
        """All text, without the pictures' places."""
        return " ".join(part.text.strip() for part in self.parts if isinstance(part, TextPart))

    @property
    def images(self) -> list[Image.Image]:
        """All pictures that were drawn."""
        return [part.image for part in self.parts if isinstance(part, DrawnPart) and part.image is not None]

    @property
    def codes(self) -> list[list[int]]:
        """The codes of every whole picture."""
        return [list(part.codes) for part in self.parts if isinstance(part, ImagePart)]

    @property
    def problems(self) -> list[str]:
        """One sentence for each broken picture."""
        return [part.reason for part in self.parts if isinstance(part, BrokenImagePart)]

    def as_content(self) -> list[str | list[int]]:
        """This answer as the content of an assistant's message: texts and codes."""
        return [part.text if isinstance(part, TextPart) else list(part.codes) for part in self.parts
                if isinstance(part, (TextPart, ImagePart))]

    def __str__(self) -> str:
        """The text with `<image>` where pictures stand."""
        return " ".join(part.text.strip() if isinstance(part, TextPart) else PLACEHOLDER for part in self.parts)
