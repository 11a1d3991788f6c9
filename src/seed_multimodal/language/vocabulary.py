"""Ids of image tokens: one per code, after the text tokens, and image start and end.

SEED-LLaMA has 32,000 + 8,192 + 2 = 40,194 tokens; an image is always `<img>` + 32 codes + `</img>`. SEED-X's image
tokens are placeholders in fixed order for continuous features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from seed_multimodal.errors import CodesError

BOI, EOI = "<img>", "</img>"
PLACEHOLDER = "<image>"  # placeholder of an image in displayed texts; not in the vocabulary
IGNORE_INDEX = -100  # label of tokens without loss (the default of torch's cross-entropy)
PATCH, PATCH_END = "<patch>", "</patch>"  # around one view of an image (SEED-X)
BOX, BOX_END = "<box_start>", "<box_end>"  # around a box's four locations (SEED-X)
BOX_WORDS = re.compile(r"(?:<(?:loc-\d+|box_start|box_end)>\s*)+")


class Ids(tuple[int, ...]):
    """A part of a prompt as ids; white space next to it is stripped, as next to an image."""


def code_token(code: int) -> str:
    """The token of a code: `<img_00012>`."""
    return f"<img_{code:05d}>"


def location_token(place: int) -> str:
    """The token of a location on the grid of boxes: `<loc-112>`."""
    return f"<loc-{place}>"


@dataclass(frozen=True)
class ImageVocabulary:
    """Sizes of the vocabulary, and conversion between codes (0..n_codes-1) and ids."""

    n_text: int = 32000
    n_codes: int = 8192
    tokens_per_image: int = 32
    fixed_image_order: ClassVar[bool] = (
        False  # an image's tokens are always the first codes in order
    )
    image_only_when_forced: ClassVar[bool] = False  # images are started only by the prompt
    ignored_below_id: ClassVar[int] = 0  # ids below it may occur inside an image, and are skipped

    @property
    def code_start(self) -> int:
        return self.n_text

    @property
    def boi_id(self) -> int:
        return self.n_text + self.n_codes

    @property
    def eoi_id(self) -> int:
        return self.boi_id + 1

    @property
    def size(self) -> int:
        """Total number of tokens."""
        return self.n_text + self.n_codes + 2

    @property
    def image_length(self) -> int:
        """Number of ids of one image, including start and end."""
        return self.tokens_per_image + 2

    @property
    def min_codes(self) -> int:
        """Minimum number of codes of an image."""
        return self.tokens_per_image

    def is_ignored_in_image(self, id: int) -> bool:
        """Whether `id` may occur inside an image, and is skipped."""
        return id < self.ignored_below_id or (self.image_only_when_forced and id == self.boi_id)

    @property
    def added_tokens(self) -> dict[str, int]:
        """All tokens after the text tokens, and their ids."""
        codes = {code_token(code): self.code_start + code for code in range(self.n_codes)}
        return {**codes, BOI: self.boi_id, EOI: self.eoi_id}

    def is_code_id(self, id: int) -> bool:
        """Whether `id` is an image code."""
        return self.code_start <= id < self.code_start + self.n_codes

    def is_image_token(self, id: int) -> bool:
        """Whether `id` is an image code, image start or image end."""
        return self.is_code_id(id) or id in (self.boi_id, self.eoi_id)

    def code_to_id(self, codes: Iterable[int]) -> list[int]:
        """Codes → ids. Raises CodesError: a code outside 0..n_codes-1."""
        ids = [self.code_start + int(code) for code in codes]
        self.id_to_code(ids)
        return ids

    def id_to_code(self, ids: Iterable[int]) -> list[int]:
        """Ids → codes. Raises CodesError: an id that is not an image code."""
        codes = [int(id) - self.code_start for id in ids]
        for place, code in enumerate(codes):
            if not 0 <= code < self.n_codes:
                raise CodesError(
                    f"Image code {code} at place {place} is outside 0..{self.n_codes - 1}."
                )
        return codes

    def image_ids(self, codes: Sequence[int]) -> list[int]:
        """`<img>`, the codes, `</img>` as ids. Raises CodesError: wrong codes or number of codes."""
        least, most = self.min_codes, self.tokens_per_image
        if not least <= len(codes) <= most:
            raise CodesError(
                f"An image has {most if least == most else f'{least} to {most}'} codes, not {len(codes)}."
            )
        return [self.boi_id, *self.code_to_id(codes), self.eoi_id]


@dataclass(frozen=True)
class SeedXVocabulary(ImageVocabulary):
    """SEED-X's vocabulary; defaults are the original's (32,330 tokens). `brackets`, `patches`, `locations`, `boxes`:
    the ids of `<img>`, `<patch>`, `<loc-0>` and `<box_start>`; the closing token follows the opening one."""

    n_codes: int = 100
    tokens_per_image: int = 64
    n_locations: int = 224
    codes: int = 32000
    brackets: int = 32100
    patches: int = 32102
    locations: int = 32104
    boxes: int = 32328
    fixed_image_order: ClassVar[bool] = True

    @classmethod
    def of_words(
        cls, added: Mapping[str, int], n_text: int, tokens_per_image: int
    ) -> SeedXVocabulary:
        """The vocabulary from a tokenizer's added tokens, in any order. Raises KeyError: a kind is missing."""
        counts = [sum(word.startswith(start) for word in added) for start in ("<img_", "<loc-")]
        starts = [int(added[word]) for word in (code_token(0), BOI, PATCH, location_token(0), BOX)]
        return cls(n_text, counts[0], tokens_per_image, counts[1], *starts)

    @property
    def added_tokens(self) -> dict[str, int]:
        locations = {
            location_token(place): self.locations + place for place in range(self.n_locations)
        }
        return {
            **super().added_tokens,
            PATCH: self.patches,
            PATCH_END: self.patches + 1,
            **locations,
            BOX: self.boxes,
            BOX_END: self.boxes + 1,
        }

    @property
    def code_start(self) -> int:
        return self.codes

    @property
    def boi_id(self) -> int:
        return self.brackets

    @property
    def size(self) -> int:
        return self.n_text + self.n_codes + self.n_locations + 6

    def is_image_token(self, id: int) -> bool:
        """Includes `<patch>` and `</patch>`."""
        return super().is_image_token(id) or id in (self.patches, self.patches + 1)

    def run(self, tokens: int = 0) -> list[int]:
        """`<img>`, `tokens` placeholders (0: the default), `</img>`."""
        return [
            self.boi_id,
            *range(self.codes, self.codes + (tokens or self.tokens_per_image)),
            self.eoi_id,
        ]

    def read_ids(self, views: int, tokens: int = 0) -> Ids:
        """Tokens of an input image in `views`: each tile in `<patch>` … `</patch>`, the whole image last; `tokens`: per
        view, 0: the default."""
        whole = self.run(tokens)
        return Ids([*[self.patches, *whole[1:-1], self.patches + 1] * (views - 1), *whole])

    def placeholder_positions(self, ids: Sequence[int]) -> list[int]:
        """Indices of the placeholders for features."""
        return [
            place
            for place, id in enumerate(ids)
            if self.codes <= id < self.codes + self.tokens_per_image
        ]
