"""transformers' tokenizer interface around a `TextTokenizer`.

transformers 5 splits text next to images differently than 4.30.2, with which the original models
were trained; `LlamaTokenizer` has the names of its class, and the ids and texts of the latter.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Self

from transformers import AddedToken, PreTrainedTokenizer

from seed_multimodal.errors import CheckpointError
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.tokenizer import SPECIAL_TOKENS, MultimodalTokenizer
from seed_multimodal.weights.find import find_path


class TransformersTokenizer(PreTrainedTokenizer):
    """Padding, truncation, tensors and names of tokens by transformers; ids and texts by `text`.

    Names of control tokens in texts become these tokens.
    """

    def __init__(
        self, text: TextTokenizer, padding_side: str = "right", **special_tokens: str
    ) -> None:
        """special_tokens: name by role (`pad_token`); the others are those of `text`."""
        self.text = text
        ids = {"bos_token": text.bos_token_id, "eos_token": text.eos_token_id}
        ids["pad_token"] = text.pad_token_id
        names = {role: text.tokens([id])[0] for role, id in ids.items() if id is not None}
        names |= special_tokens
        # None is added: all are tokens of `text`.
        self._added_tokens_decoder = {
            text.token_id(name): AddedToken(name, special=True) for name in names.values()
        }
        super().__init__(padding_side=padding_side, **names)

    def save_pretrained(self, save_directory: str | Path, **kwargs: object) -> tuple[str, ...]:
        """Write the files of `text`; returns their paths."""
        folder = self.text.save_pretrained(save_directory)
        return tuple(str(file) for file in sorted(folder.iterdir()))

    # ---- vocabulary

    def __len__(self) -> int:
        return len(self.text)

    @property
    def vocab_size(self) -> int:
        """Number of text tokens, without the added ones."""
        return self.text.vocabulary.n_text

    def get_vocab(self) -> dict[str, int]:
        return {token: id for id, token in enumerate(self.text.tokens(range(len(self))))}

    def _convert_token_to_id(self, token: str) -> int:
        return self.text.token_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.text.tokens([index])[0]

    # ---- text ⇄ ids

    def tokenize(self, text: str, **kwargs: object) -> list[str]:
        return self.text.tokens(self.text.encode(text))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [*self.text.start_ids, *token_ids_0, *(token_ids_1 or ())]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._decode(list(map(self.text.token_id, tokens)))

    def _decode(
        self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: object
    ) -> str:
        """The text of more ids continues that of fewer, as streamers need it."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        texts: list[str] = []
        for is_special, group in itertools.groupby(ids, self.text.is_special):
            if not is_special:
                texts.append(self.text.decode(group))
            elif not skip_special_tokens:
                texts += self.text.tokens(group)
        return "".join(texts)


class LlamaTokenizer(TransformersTokenizer):
    """Text ⇄ ids as by the slow LLaMA tokenizer of transformers 4.30.2."""

    text: MultimodalTokenizer

    def __init__(self, text: MultimodalTokenizer) -> None:
        super().__init__(text, **SPECIAL_TOKENS)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **unused: Any
    ) -> Self:
        """The tokenizer of a folder or hub name. Raises CheckpointError: missing, damaged files."""
        folder = find_path(pretrained_model_name_or_path)
        if folder is None:
            raise CheckpointError(f"{pretrained_model_name_or_path}: no such tokenizer folder.")
        return cls(MultimodalTokenizer.from_pretrained(folder))

    def _decode(
        self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: object
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return self.text.decode(ids, skip_special_tokens)
