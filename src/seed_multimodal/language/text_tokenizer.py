"""`TextTokenizer`: texts and images → token ids and back, with the rules of a subclass."""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.language.vocabulary import Ids, ImageVocabulary

Part = str | Sequence[int]  # a text, or the codes of an image
HUB_TOKENIZER = "tokenizer.json"  # file of a tokenizer of transformers' fast kind
# Image codes and SEED-X's locations: one pattern, since thousands of alternatives would be slow.
_NUMBERED_TOKEN = re.compile(r"<(?:img_|loc-)[0-9]+>")


class SpecialIds(TypedDict):
    """Special ids in a language model's configuration."""

    bos_token_id: int | None
    eos_token_id: int | list[int]
    pad_token_id: int | None


LLAMA_IDS: SpecialIds = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # LLaMA 1 and 2


class TextTokenizer(ABC):
    """Texts and images → token ids and back.

    vocabulary: number of tokens, and ids of the image tokens.
    bos_token_id: the token before every text; None: there is none.
    start_ids: what a sequence begins with: `bos_token_id`, or nothing.
    eos_token_ids: all tokens that end a generated answer; the first one ends it in training data.
    pad_token_id: in padded positions, which have no attention and no loss.
    strips_at_images: whether white space next to images is dropped, at inference and in training.
    names_image_tokens: whether image tokens have names; without, `decode` skips them.
    joiner: between texts and image tokens in decoded texts.
    """

    vocabulary: ImageVocabulary
    bos_token_id: int | None
    start_ids: tuple[int, ...]
    eos_token_ids: Sequence[int]
    pad_token_id: int
    strips_at_images: bool
    names_image_tokens = True
    has_chat_template = False
    joiner = ""

    def __init__(
        self,
        vocabulary: ImageVocabulary,
        n_text: int,
        added: Mapping[str, int],
        special: Mapping[str, int],
        strips: Mapping[str, tuple[bool, bool]] | None = None,
    ) -> None:
        """n_text: number of text tokens. added: token → id of the image tokens, if they have names.

        special: token → id of the control tokens of texts, as `</s>`.
        strips: token → whether `encode` drops the white space before and after it, where that is
        not as next to images.
        """
        self.vocabulary = vocabulary
        self._n_text = n_text
        self._added_names = {id: name for name, id in added.items()}
        self._special_ids = frozenset(special.values())
        self._control_ids = {**special, **added}
        self._strips = strips or {}
        # The longest match counts.
        names = [name for name in self._control_ids if not _NUMBERED_TOKEN.fullmatch(name)]
        names.sort(key=len, reverse=True)
        patterns = [_NUMBERED_TOKEN.pattern, *map(re.escape, names)]
        self._control_pattern = re.compile("|".join(patterns))

    # ---- a subclass defines

    @abstractmethod
    def _encode_text(self, text: str) -> list[int]:
        """Ids of a text in which names of control tokens are letters."""

    @abstractmethod
    def _decode_text(self, ids: list[int]) -> str:
        """The text of text tokens, special ones by their names."""

    @abstractmethod
    def token_id(self, token: str) -> int:
        """Id of a token by its name (`▁hell`, `<img_00005>`); of unknown ones `<unk>`'s, or 0."""

    @abstractmethod
    def _text_token(self, id: int) -> str:
        """The name of a text token."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the tokenizer's files."""

    def render_chat(self, messages: Sequence[Mapping[str, object]]) -> str:
        """Messages (role and content) in the tokenizer's chat template, with names of special
        tokens; after a user's message up to where the answer begins.

        Raises ConfigError: there is no template, or it refuses the messages.
        """
        raise ConfigError("template chat: this tokenizer has no chat template.")

    # ---- text ⇄ ids

    @property
    def longest_token(self) -> int:
        """Characters of the longest text token."""
        return max(map(len, self.tokens(range(self._n_text))))

    def __len__(self) -> int:
        return self.vocabulary.size

    @property
    def eos_token_id(self) -> int:
        """The token that ends an answer in training data."""
        return self.eos_token_ids[0]

    @property
    def special_ids(self) -> SpecialIds:
        """The ids for the configuration of the language model."""
        ends = list(self.eos_token_ids)
        return {
            "bos_token_id": self.bos_token_id,
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            # A model's row of padding is not trained, so it is none of the ends of an answer.
            "pad_token_id": None if self.pad_token_id in ends else self.pad_token_id,
        }

    def is_special(self, id: int) -> bool:
        """Whether `id` is a control token of texts, as `</s>`."""
        return id in self._special_ids

    def split(self, text: str) -> tuple[list[str], list[str]]:
        """The segments around the control tokens of a text (one more, possibly empty), and these.

        An `<img_99999>` that is not in the vocabulary is text.
        """
        texts: list[str] = []
        names: list[str] = []
        start = 0
        for match in self._control_pattern.finditer(text):
            if match[0] in self._control_ids:
                texts.append(text[start : match.start()])
                names.append(match[0])
                start = match.end()
        return [*texts, text[start:]], names

    def control_parts(self, text: str) -> list[Part]:
        """A text with its control tokens as `Ids`."""
        return self._with_ids(*self.split(text))

    def _with_ids(self, texts: Sequence[str], names: Sequence[str]) -> list[Part]:
        """The parts of a text that was split."""
        parts: list[Part] = []
        for text, name in zip(texts, names, strict=False):
            parts += [text, Ids([self._control_ids[name]])]
        return [*parts, texts[-1]]

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """A text → ids; names of special and image tokens in it become these tokens.

        add_bos: prepend `start_ids`. Raises RequestError: text that is not Unicode.
        """
        texts, names = self.split(text)
        as_at_images = (self.strips_at_images, self.strips_at_images)
        for index, name in enumerate(names):
            strips_before, strips_after = self._strips.get(name, as_at_images)
            if strips_before:
                texts[index] = texts[index].rstrip()
            if strips_after:
                texts[index + 1] = texts[index + 1].lstrip()
        return self.encode_parts(self._with_ids(texts, names), strip=False, add_bos=add_bos)

    def encode_parts(
        self, parts: Sequence[Part], strip: bool = True, add_bos: bool = False
    ) -> list[int]:
        """Texts, codes of images and `Ids` → ids; names of control tokens are plain text.

        strip: drop white space next to images and ids, if `strips_at_images`.
        add_bos: prepend `start_ids`.
        Raises CodesError: not the codes of one image; RequestError: text that is not Unicode.
        """
        if strip and self.strips_at_images:
            parts = without_space_at_images(parts)
        ids = list(self.start_ids) if add_bos else []
        for part in parts:
            if isinstance(part, str):
                try:
                    part.encode()
                except UnicodeEncodeError:  # lone surrogates: bytes that are not UTF-8
                    raise RequestError("The text must be plain Unicode text.") from None
                ids += self._encode_text(part)
            elif isinstance(part, Ids):
                ids += part
            else:
                ids += self.vocabulary.image_ids(part)
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Ids → text, with names of image tokens. Raises CodesError: an id outside."""
        # 1. What is written: names of added tokens, and text tokens.
        hidden = self._special_ids if skip_special_tokens else ()
        written = [
            id
            for id in self.vocabulary.checked_ids(ids)
            if id not in hidden and (id < self._n_text or id in self._added_names)
        ]

        # 2. Text tokens between added tokens are decoded together.
        texts: list[str] = []
        for name, group in itertools.groupby(written, self._added_names.get):
            if name is None:
                texts.append(self._decode_text(list(group)))
            else:
                texts += [name for _ in group]
        return self.joiner.join(texts)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Ids → the name of each token (`▁hell`, `<0x0A>`, `<img_00005>`), else the id: `<32002>`.

        Raises CodesError: an id outside the vocabulary.
        """
        tokens: list[str] = []
        for id in self.vocabulary.checked_ids(ids):
            if id in self._added_names:
                tokens.append(self._added_names[id])
            else:
                tokens.append(self._text_token(id) if id < self._n_text else f"<{id}>")
        return tokens


def without_space_at_images(parts: Sequence[Any]) -> list[Any]:
    """The parts without white space in texts next to images and ids."""
    stripped: list[Any] = []
    for previous, part, following in zip(["", *parts], parts, [*parts[1:], ""], strict=False):
        if isinstance(part, str) and not isinstance(previous, str):
            part = part.lstrip()
        if isinstance(part, str) and not isinstance(following, str):
            part = part.rstrip()
        stripped.append(part)
    return stripped
