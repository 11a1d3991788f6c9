"""Ids of the image tokens: one per code, behind the text pieces, and the two brackets around an image.

SEED-LLaMA has 32,000 + 8,192 + 2 = 40,194 words; an image is always `<img>` + 32 codes + `</img>`. SEED-X's image words
are placeholders, always the same in the same order, where the model reads and writes continuous features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from seed_multimodal.errors import CodesError

BOI, EOI = "<img>", "</img>"
PLACEHOLDER = "<image>"  # stands for an image in texts shown to people; never a word of the vocabulary
PATCH, PATCH_END = "<patch>", "</patch>"  # around one view of an image (SEED-X)
BOX, BOX_END = "<box_start>", "<box_end>"  # around a box's four locations (SEED-X)
BOX_WORDS = re.compile(r"(?:<(?:loc-\d+|box_start|box_end)>\s*)+")


class Ids(tuple[int, ...]):
    """A part of a prompt given by its ids; texts beside it lose their white space there, as beside an image."""


def code_token(code: int) -> str:
    """The word of one code: `<img_00012>`."""
    return f"<img_{code:05d}>"


def location_word(place: int) -> str:
    """The word of a place on the grid of boxes: `<loc-112>`."""
    return f"<loc-{place}>"


@dataclass(frozen=True)
class ImageVocabulary:
    """Sizes of the vocabulary's parts, and the arithmetic between codes (0..n_codes-1) and ids."""

    n_text: int = 32000
    n_codes: int = 8192
    tokens_per_image: int = 32
    in_order: ClassVar[bool] = False  # an image's words are always the first codes, one after the other
    begun_only: ClassVar[bool] = False  # only the prompt begins an image
    free_inside: ClassVar[int] = 0  # ids below it are possible inside an image, and left out of it

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
        """Number of words in all."""
        return self.n_text + self.n_codes + 2

    @property
    def image_length(self) -> int:
        """Ids of one image, brackets included."""
        return self.tokens_per_image + 2

    @property
    def least_codes(self) -> int:
        """The fewest codes of an image."""
        return self.tokens_per_image

    def counts_for_nothing(self, id: int) -> bool:
        """Whether `id` is possible inside an image, and left out of it."""
        return id < self.free_inside or (self.begun_only and id == self.boi_id)

    @property
    def words(self) -> dict[str, int]:
        """Every word behind the text pieces, and its id."""
        codes = {code_token(code): self.code_start + code for code in range(self.n_codes)}
        return {**codes, BOI: self.boi_id, EOI: self.eoi_id}

    def is_code_id(self, id: int) -> bool:
        """Whether `id` is the word of an image code."""
        return self.code_start <= id < self.code_start + self.n_codes

    def is_image_word(self, id: int) -> bool:
        """Whether `id` is an image code or one of the brackets around them."""
        return self.is_code_id(id) or id in (self.boi_id, self.eoi_id)

    def code_to_id(self, codes: Iterable[int]) -> list[int]:
        """Codes → ids; raises `CodesError` for a code outside 0..n_codes-1."""
        ids = [self.code_start + int(code) for code in codes]
        self.id_to_code(ids)
        return ids

    def id_to_code(self, ids: Iterable[int]) -> list[int]:
        """Ids → codes; raises `CodesError` for an id that is no image code."""
        codes = [int(id) - self.code_start for id in ids]
        for place, code in enumerate(codes):
            if not 0 <= code < self.n_codes:
                raise CodesError(f"Image code {code} at place {place} is outside 0..{self.n_codes - 1}.")
        return codes

    def image_ids(self, codes: Sequence[int]) -> list[int]:
        """`<img>`, the codes, `</img>` as ids; raises `CodesError` for another number of codes or wrong ones."""
        least, most = self.least_codes, self.tokens_per_image
        if not least <= len(codes) <= most:
            raise CodesError(f"An image has {most if least == most else f'{least} to {most}'} codes, not {len(codes)}.")
        return [self.boi_id, *self.code_to_id(codes), self.eoi_id]


@dataclass(frozen=True)
class SeedXVocabulary(ImageVocabulary):
    """SEED-X's words; the defaults are the original ones (32,330 in all). `brackets`, `patches`, `locations`,
    `boxes`: the ids of `<img>`, `<patch>`, `<loc-0>` and `<box_start>`; the closing word follows the opening one."""

    n_codes: int = 100
    tokens_per_image: int = 64
    n_locations: int = 224
    codes: int = 32000
    brackets: int = 32100
    patches: int = 32102
    locations: int = 32104
    boxes: int = 32328
    in_order: ClassVar[bool] = True

    @classmethod
    def of_words(cls, added: Mapping[str, int], n_text: int, tokens_per_image: int) -> SeedXVocabulary:
        """The vocabulary of a tokenizer's added words, in any order; `KeyError`: the first of a kind is missing."""
        counts = [sum(word.startswith(start) for word in added) for start in ("<img_", "<loc-")]
        starts = [int(added[word]) for word in (code_token(0), BOI, PATCH, location_word(0), BOX)]
        return cls(n_text, counts[0], tokens_per_image, counts[1], *starts)

    @property
    def words(self) -> dict[str, int]:
        locations = {location_word(place): self.locations + place for place in range(self.n_locations)}
        return {**super().words, PATCH: self.patches, PATCH_END: self.patches + 1, **locations, BOX: self.boxes,
                BOX_END: self.boxes + 1}

    @property
    def code_start(self) -> int:
        return self.codes

    @property
    def boi_id(self) -> int:
        return self.brackets

    @property
    def size(self) -> int:
        return self.n_text + self.n_codes + self.n_locations + 6

    def is_image_word(self, id: int) -> bool:
        """`<patch>` and `</patch>` are such words, too."""
        return super().is_image_word(id) or id in (self.patches, self.patches + 1)

    def run(self, tokens: int = 0) -> list[int]:
        """`<img>`, its placeholders (`tokens` of them; 0: as many as an image has), `</img>`."""
        return [self.boi_id, *range(self.codes, self.codes + (tokens or self.tokens_per_image)), self.eoi_id]

    def read_ids(self, views: int, tokens: int = 0) -> Ids:
        """The words of an image in `views` that the model reads: each part in `<patch>` … `</patch>`, the whole image
        last; `tokens`: words of one view, 0: as many as an image has."""
        whole = self.run(tokens)
        return Ids([*[self.patches, *whole[1:-1], self.patches + 1] * (views - 1), *whole])

    def places(self, ids: Sequence[int]) -> list[int]:
        """Indices of the placeholders, where features are put."""
        return [place for place, id in enumerate(ids) if self.codes <= id < self.codes + self.tokens_per_image]
