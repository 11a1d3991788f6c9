"""`TextTokenizer`: what data, training and inference use of a tokenizer, of any kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

if TYPE_CHECKING:
    from seed_multimodal.language.vocabulary import ImageVocabulary

Part = str | Sequence[int]  # a text, or the codes of an image
HUB_TOKENIZER = "tokenizer.json"  # file of a tokenizer of transformers' fast kind


class SpecialIds(TypedDict):
    """Special ids in a language model's configuration."""

    bos_token_id: int | None
    eos_token_id: int | list[int]
    pad_token_id: int | None


class TextTokenizer(Protocol):
    """Texts and images → token ids and back."""

    @property
    def vocabulary(self) -> ImageVocabulary:
        """Number of tokens, and ids of the image tokens."""

    # ---- special tokens

    @property
    def bos_token_id(self) -> int | None:
        """The token before every text; None: there is none."""

    @property
    def eos_token_id(self) -> int:
        """The token that ends an answer in training data."""

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """All tokens that end a generated answer, among them `eos_token_id`."""

    @property
    def pad_token_id(self) -> int:
        """The token in padded positions; its attention is masked, and it has no loss."""

    @property
    def start_ids(self) -> Sequence[int]:
        """What a sequence begins with: `bos_token_id`, or nothing."""

    @property
    def special_ids(self) -> SpecialIds:
        """The ids for the configuration of the language model."""

    @property
    def strips_at_images(self) -> bool:
        """Whether white space next to images is dropped, at inference and in training data."""

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""

    def render_chat(self, messages: Sequence[Mapping[str, object]]) -> str:
        """Messages (role and content) in the tokenizer's chat template, after a user's up to where
        the answer begins; names of special tokens are in it."""

    # ---- text ⇄ ids

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """A text → ids; names of special and image tokens in it become these tokens.

        add_bos: prepend `start_ids`.
        """

    def encode_parts(
        self, parts: Sequence[Part], strip: bool = True, add_bos: bool = False
    ) -> list[int]:
        """Texts, codes of images and `Ids` → ids; names of special tokens are plain text.

        strip: strip white space next to images.
        add_bos: prepend `start_ids`.
        Raises CodesError: not the codes of one image; RequestError: text that is not Unicode.
        """

    def split(self, text: str) -> tuple[list[str], list[str]]:
        """The segments around the names of special tokens in a text (one more), and these names."""

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Ids → text. Raises CodesError: an id outside the vocabulary."""

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Ids → the name of each token. Raises CodesError: an id outside the vocabulary."""

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the tokenizer's files."""
