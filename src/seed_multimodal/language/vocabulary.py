"""Ids of image tokens: one per code, after the text tokens, and image start and end.

SEED-LLaMA has 32,000 + 8,192 + 2 = 40,194 tokens; an image is always `<img>` + 32 codes + `</img>`.
SEED-X's image tokens are placeholders in fixed order for continuous features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Self

from seed_multimodal.errors import CodesError

BOI = "<img>"
EOI = "</img>"
PLACEHOLDER = "<image>"  # placeholder of an image in displayed texts; not in the vocabulary
# A text of these characters alone is no request. Most of them have no width.
BLANK = " \t\r\n.\xa0\xad\u200b\u200c\u200d\u200e\u200f\u2060\u3000\ufeff"
IGNORE_INDEX = -100  # label of tokens without loss (the default of torch's cross-entropy)
# SEED-X: around one view of an image, and around a box's four locations.
PATCH = "<patch>"
PATCH_END = "</patch>"
BOX = "<box_start>"
BOX_END = "<box_end>"
BOX_WORDS = re.compile(r"(?:<(?:loc-\d++|box_start|box_end)>\s*+)++")


class Ids(tuple[int, ...]):
    """A part of a prompt as ids; white space next to it is stripped, as next to an image."""


def code_token(code: int) -> str:
    """The token of a code: `<img_00012>`."""
    return f"<img_{code:05d}>"


def location_token(location: int) -> str:
    """The token of a location on the grid of boxes: `<loc-112>`."""
    return f"<loc-{location}>"


@dataclass(frozen=True)
class ImageVocabulary:
    """Sizes of the vocabulary, and conversion between codes (0..n_codes-1) and ids.

    tokens_per_image: codes of an image at most. fewest_codes: at least; None: as many.
    fixed_image_order: an image's tokens are always the first codes in order.
    image_only_when_forced: images are started only by the prompt.
    ignored_below_id: smaller ids may occur inside an image, and are skipped.
    """

    # SEED-LLaMA's sizes.
    n_text: int = 32000
    n_codes: int = 8192
    tokens_per_image: int = 32
    fewest_codes: int | None = field(default=None, kw_only=True)
    fixed_image_order: ClassVar[bool] = False
    image_only_when_forced: ClassVar[bool] = False
    ignored_below_id: ClassVar[int] = 0

    @cached_property
    def code_start(self) -> int:
        return self.n_text

    @cached_property
    def boi_id(self) -> int:
        return self.n_text + self.n_codes

    @cached_property
    def eoi_id(self) -> int:
        return self.boi_id + 1

    @cached_property
    def size(self) -> int:
        """Total number of tokens."""
        return self.n_text + self.n_codes + 2

    @cached_property
    def image_length(self) -> int:
        """Number of ids of one image, including start and end."""
        return self.tokens_per_image + 2

    @cached_property
    def min_codes(self) -> int:
        """Minimum number of codes of an image."""
        return self.tokens_per_image if self.fewest_codes is None else self.fewest_codes

    def of_length(self, n_codes: int) -> Self:
        """The vocabulary of an image with so many codes."""
        return replace(self, tokens_per_image=n_codes, fewest_codes=n_codes)

    def is_ignored_in_image(self, id: int) -> bool:
        """Whether `id` may occur inside an image, and is skipped."""
        if self.image_only_when_forced and id == self.boi_id:
            return True
        return id < self.ignored_below_id

    @property
    def added_tokens(self) -> dict[str, int]:
        """All tokens after the text tokens, and their ids."""
        codes = {code_token(code): self.code_start + code for code in range(self.n_codes)}
        return {**codes, BOI: self.boi_id, EOI: self.eoi_id}

    def checked_ids(self, ids: Iterable[int]) -> list[int]:
        """Ids as a list of ints. Raises CodesError: an id outside the vocabulary."""
        checked = [int(id) for id in ids]
        for id in checked:
            if not 0 <= id < self.size:
                raise CodesError(f"Token id {id} is outside the vocabulary of {self.size} tokens.")
        return checked

    def is_code_id(self, id: int) -> bool:
        """Whether `id` is an image code."""
        return self.code_start <= id < self.code_start + self.n_codes

    def is_image_token(self, id: int) -> bool:
        """Whether `id` is an image code, image start or image end."""
        return self.is_code_id(id) or id in (self.boi_id, self.eoi_id)

    def first_codes(self, ids: Sequence[int]) -> list[int]:
        """The codes of the first image in `ids`, complete or not, up to its end."""
        codes: list[int] = []
        for id in ids:
            if id == self.eoi_id:
                break
            if self.is_code_id(id):
                codes.append(id - self.code_start)
        return codes

    def code_to_id(self, codes: Iterable[int]) -> list[int]:
        """Codes → ids. Raises CodesError: a code outside 0..n_codes-1."""
        ids: list[int] = []
        for position, code in enumerate(codes):
            if not 0 <= code < self.n_codes:
                raise CodesError(
                    f"Image code {code} at place {position} is outside 0..{self.n_codes - 1}."
                )
            ids.append(self.code_start + int(code))
        return ids

    def image_ids(self, codes: Sequence[int]) -> list[int]:
        """`<img>`, the codes, `</img>` as ids.

        Raises CodesError: a code outside 0..n_codes-1, or the wrong number of codes.
        """
        minimum = self.min_codes
        maximum = self.tokens_per_image
        if not minimum <= len(codes) <= maximum:
            expected = maximum if minimum == maximum else f"{minimum} to {maximum}"
            raise CodesError(f"An image has {expected} codes, not {len(codes)}.")
        return [self.boi_id, *self.code_to_id(codes), self.eoi_id]


class ImageGrammar:
    """Where the tokens of an answer stand, in an image or outside, and which may follow.

    An image is `<img>`, its codes, `</img>`; no code stands elsewhere. SEED-LLaMA: exactly 32
    codes; SEED-X: the same 64 tokens in order, of which only the hidden states count; LaVIT: 1 to
    256 codes.

    budget: images fit into so many generated tokens; None: unknown; 0: there are none.
    end_id: ends the answer where an image would follow a text, but there are none; None: nothing.
    original: only those of SEED-X's image tokens are forbidden that its original code forbids.
    initial_ids: tokens of the answer that the prompt holds.
    length: generated tokens. n_in_image: those behind the last `<img>`; None: outside of an image.
    """

    def __init__(
        self,
        vocabulary: ImageVocabulary,
        budget: int | None = None,
        end_id: int | None = None,
        original: bool = False,
        initial_ids: Iterable[int] = (),
    ) -> None:
        self.vocabulary = vocabulary
        self.budget = None if original else budget
        self.end_id = end_id
        self.original = original
        self.n_in_image: int | None = None
        self.length = 0
        for id in initial_ids:
            self.feed(id)
        self.length = 0

    def feed(self, id: int) -> None:
        """Add a token."""
        self.length += 1
        if id == self.vocabulary.boi_id:
            self.n_in_image = 0
        elif id == self.vocabulary.eoi_id:
            self.n_in_image = None
        elif self.n_in_image is not None:
            self.n_in_image += 1

    @property
    def state(self) -> tuple[int | None, bool, bool]:
        """What the next token depends on.

        The codes so far (how many, or where their order is free only whether they suffice); whether
        `<img>` may follow a text; whether `end_id` follows in place of it.
        """
        vocabulary = self.vocabulary
        n_codes = self.n_in_image
        if n_codes is not None and not vocabulary.fixed_image_order:
            is_complete = n_codes >= vocabulary.tokens_per_image
            n_codes = (n_codes >= vocabulary.min_codes) + is_complete
        if vocabulary.image_only_when_forced:
            return n_codes, False, False
        fits = self.budget is None or self.budget - self.length >= vocabulary.image_length
        ends = self.budget == 0 and self.length > 0 and self.n_in_image is None
        return n_codes, fits, ends and self.end_id is not None

    def candidates(self) -> Sequence[int]:
        """Tokens of which some may follow: in an image those of images, and ignored ones."""
        vocabulary = self.vocabulary
        if self.n_in_image is None:
            return range(vocabulary.size)
        codes = range(vocabulary.code_start, vocabulary.code_start + vocabulary.n_codes)
        ignored = range(vocabulary.ignored_below_id)
        return [*ignored, *codes, vocabulary.boi_id, vocabulary.eoi_id]

    def allows(self, id: int) -> bool:
        """Whether a token may follow."""
        vocabulary = self.vocabulary
        count = self.n_in_image
        code = id - vocabulary.code_start
        if count is None:
            if self.original and id != vocabulary.eoi_id:
                return not 0 <= code < vocabulary.tokens_per_image
            return not vocabulary.is_image_token(id) or (id == vocabulary.boi_id and self.state[1])
        if id == vocabulary.eoi_id:
            return count >= vocabulary.min_codes
        if vocabulary.is_code_id(id):
            is_next = code == count or not vocabulary.fixed_image_order
            return is_next and count < vocabulary.tokens_per_image
        return vocabulary.is_ignored_in_image(id)


@dataclass(frozen=True)
class SeedXVocabulary(ImageVocabulary):
    """SEED-X's vocabulary; the defaults are the original's (32,330 tokens).

    codes: the id of the first placeholder.
    brackets, patches, locations, boxes: the ids of `<img>`, `<patch>`, `<loc-0>` and `<box_start>`;
    the closing token follows the opening one.
    """

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
    def behind(
        cls, n_text: int, n_codes: int, tokens_per_image: int, n_locations: int
    ) -> SeedXVocabulary:
        """The vocabulary of tokens in the original's order behind any number of text tokens."""
        brackets = n_text + n_codes
        patches = brackets + 2
        locations = patches + 2
        return cls(
            n_text,
            n_codes,
            tokens_per_image,
            n_locations,
            codes=n_text,
            brackets=brackets,
            patches=patches,
            locations=locations,
            boxes=locations + n_locations,
        )

    @classmethod
    def from_added_tokens(
        cls, added: Mapping[str, int], n_text: int, tokens_per_image: int
    ) -> SeedXVocabulary:
        """The vocabulary of a tokenizer's added tokens. Raises KeyError: a kind is missing."""
        n_codes = sum(token.startswith("<img_") for token in added)
        n_locations = sum(token.startswith("<loc-") for token in added)
        return cls(
            n_text,
            n_codes,
            tokens_per_image,
            n_locations,
            codes=int(added[code_token(0)]),
            brackets=int(added[BOI]),
            patches=int(added[PATCH]),
            locations=int(added[location_token(0)]),
            boxes=int(added[BOX]),
        )

    @property
    def added_tokens(self) -> dict[str, int]:
        locations = {
            location_token(location): self.locations + location
            for location in range(self.n_locations)
        }
        return {
            **super().added_tokens,
            PATCH: self.patches,
            PATCH_END: self.patches + 1,
            **locations,
            BOX: self.boxes,
            BOX_END: self.boxes + 1,
        }

    @cached_property
    def code_start(self) -> int:
        return self.codes

    @cached_property
    def boi_id(self) -> int:
        return self.brackets

    @cached_property
    def size(self) -> int:
        return self.n_text + self.n_codes + self.n_locations + 6

    def is_image_token(self, id: int) -> bool:
        """Includes `<patch>` and `</patch>`."""
        return super().is_image_token(id) or id in (self.patches, self.patches + 1)

    def run(self, tokens: int = 0) -> list[int]:
        """`<img>`, `tokens` placeholders (0: the default), `</img>`."""
        n_tokens = tokens or self.tokens_per_image
        placeholders = range(self.codes, self.codes + n_tokens)
        return [self.boi_id, *placeholders, self.eoi_id]

    def read_ids(self, views: int, tokens: int = 0) -> Ids:
        """Tokens of an input image: each tile in `<patch>` … `</patch>`, the complete image last.

        views: their number, with the complete image. tokens: of each view, 0: the default.
        """
        # A tile has the image's tokens in other brackets.
        image = self.run(tokens)
        tile = [self.patches, *image[1:-1], self.patches + 1]
        return Ids([*tile * (views - 1), *image])

    def placeholder_positions(self, ids: Sequence[int]) -> list[int]:
        """Indices of the placeholders for features."""
        end = self.codes + self.tokens_per_image
        return [position for position, id in enumerate(ids) if self.codes <= id < end]
