"""The vocabulary of pictures: ids of the image codes and of the two brackets around them.

Layout: text pieces first, then one word per code, then `<img>` and `</img>`. The released models have 32,000 + 8,192
+ 2 = 40,194 words; one picture is always `<img>` + 32 codes + `</img>` = 34 of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from seed_multimodal.errors import CodesError

BOI = "<img>"
EOI = "</img>"
PLACEHOLDER = "<image>"  # stands for a picture in texts shown to people; never a word of the vocabulary


def code_token(code: int) -> str:
    """The word of one code: `<img_00012>`."""
    return f"<img_{code:05d}>"


@dataclass(frozen=True)
class ImageVocabulary:
    """Sizes of the vocabulary's parts, and the arithmetic between codes (0..n_codes-1) and ids."""

    n_text: int = 32000
    n_codes: int = 8192
    tokens_per_image: int = 32

    @property
    def boi_id(self) -> int:
        """Id of `<img>`."""
        return self.n_text + self.n_codes

    @property
    def eoi_id(self) -> int:
        """Id of `</img>`."""
        return self.boi_id + 1

    @property
    def size(self) -> int:
        """Number of words in all."""
        return self.n_text + self.n_codes + 2

    @property
    def image_length(self) -> int:
        """Ids one picture takes, brackets included."""
        return self.tokens_per_image + 2

    def is_code_id(self, id: int) -> bool:
        """Whether `id` is the word of an image code."""
        return self.n_text <= id < self.boi_id

    def is_image_word(self, id: int) -> bool:
        """Whether `id` is an image code or one of the brackets around them."""
        return self.is_code_id(id) or id in (self.boi_id, self.eoi_id)

    def code_to_id(self, codes: Iterable[int]) -> list[int]:
        """Codes -> ids.

        Raises:
            CodesError: a code outside 0..n_codes-1.
        """
        values = [int(code) for code in codes]
        for place, code in enumerate(values):
            if not 0 <= code < self.n_codes:
                raise CodesError(f"Image code {code} at place {place} is outside 0..{self.n_codes - 1}.")
        return [self.n_text + code for code in values]

    def id_to_code(self, ids: Iterable[int]) -> list[int]:
        """Ids -> codes.

        Raises:
            CodesError: an id that is no image code.
        """
        values = [int(id) for id in ids]
        for place, id in enumerate(values):
            if not self.is_code_id(id):
                raise CodesError(f"Token id {id} at place {place} is not an image code "
                                 f"({self.n_text}..{self.boi_id - 1}).")
        return [id - self.n_text for id in values]

    def check_codes(self, codes: Sequence[int]) -> list[int]:
        """The codes of one whole picture as plain ints.

        Raises:
            CodesError: not `tokens_per_image` of them, or one outside the codebook.
        """
        if len(codes) != self.tokens_per_image:
            raise CodesError(f"A picture has {self.tokens_per_image} codes, not {len(codes)}.")
        return [id - self.n_text for id in self.code_to_id(codes)]

    def image_ids(self, codes: Sequence[int]) -> list[int]:
        """`<img>`, the codes, `</img>` as ids.

        Raises:
            CodesError: as `check_codes`.
        """
        return [self.boi_id, *self.code_to_id(self.check_codes(codes)), self.eoi_id]

    def image_text(self, codes: Iterable[int]) -> str:
        """`<img><img_00005>…</img>`, for prompts written as one string; any number of codes (not checked)."""
        return BOI + "".join(code_token(int(code)) for code in codes) + EOI
