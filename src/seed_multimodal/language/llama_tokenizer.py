"""`LlamaTokenizer`: transformers' tokenizer interface around `MultimodalTokenizer`.

transformers 5 splits text next to images differently than 4.30.2, with which the original models
were trained; this class has the names and results of the latter. Padding is on the right unless
`padding_side` says "left".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.tokenizer import SPECIAL_TOKENS, MultimodalTokenizer
from seed_multimodal.weights.find import find_path

if TYPE_CHECKING:
    from transformers import BatchEncoding

TokenIds: TypeAlias = int | Sequence[int] | np.ndarray | Tensor
UNLIMITED = int(1e30)  # transformers' number for "no maximum length"


class LlamaTokenizer:
    """Text ⇄ ids as by the slow LLaMA tokenizer of transformers 4.30.2."""

    bos_token = "<s>"
    eos_token = "</s>"
    unk_token = "<unk>"
    pad_token = "<unk>"
    bos_token_id = 1
    eos_token_id = 2
    unk_token_id = 0
    pad_token_id = 0
    padding_side = "right"
    model_max_length = UNLIMITED

    def __init__(self, text: MultimodalTokenizer) -> None:
        self.text = text

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **unused: Any) -> Self:
        """The tokenizer of a folder or hub name. Raises CheckpointError: missing, damaged files."""
        folder = find_path(pretrained_model_name_or_path)
        if folder is None:
            raise CheckpointError(f"{pretrained_model_name_or_path}: no such tokenizer folder.")
        return cls(MultimodalTokenizer.from_pretrained(folder))

    def save_pretrained(self, save_directory: str | Path) -> tuple[str, ...]:
        """Write the tokenizer's files; returns their paths."""
        folder = self.text.save_pretrained(save_directory)
        return tuple(str(file) for file in sorted(folder.iterdir()))

    # ---- vocabulary

    def __len__(self) -> int:
        return len(self.text)

    @property
    def vocab_size(self) -> int:
        """Number of text tokens, without the added ones."""
        return self.text.vocabulary.n_text

    @property
    def all_special_tokens(self) -> list[str]:
        """`<unk>`, `<s>` and `</s>`."""
        return list(SPECIAL_TOKENS.values())

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of `all_special_tokens`."""
        return [self.text.token_id(token) for token in self.all_special_tokens]

    def get_vocab(self) -> dict[str, int]:
        """Token → id."""
        return {token: id for id, token in enumerate(self.text.tokens(range(len(self))))}

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """The id of a token, or a list of ids; `unk_token_id` for unknown tokens."""
        if isinstance(tokens, str):
            return self.text.token_id(tokens)
        return [self.text.token_id(token) for token in tokens]

    def convert_ids_to_tokens(
        self, ids: int | Sequence[int], skip_special_tokens: bool = False
    ) -> str | list[str]:
        """The token of an id, or a list of tokens."""
        if isinstance(ids, int):
            return self.text.tokens([ids])[0]
        hidden = set(self.all_special_ids) if skip_special_tokens else set()
        return self.text.tokens(id for id in _id_list(ids) if id not in hidden)

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Tokens → text."""
        return self.text.decode(map(self.text.token_id, tokens))

    # ---- text → ids

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """Text → tokens."""
        return self.text.tokens(self.encode(text, add_special_tokens))

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> list[int] | Tensor:
        """Text → ids, after `<s>` with `add_special_tokens`; `return_tensors`: as `[1, L]`."""
        ids = self.text.encode(text, add_bos=add_special_tokens)
        if truncation:
            ids = ids[:max_length]
        if return_tensors is None:
            return ids
        batch = self.pad({"input_ids": [ids]}, padding=False, return_tensors=return_tensors)
        return batch.input_ids

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        *,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
    ) -> BatchEncoding:
        """A text, or several → `input_ids` and `attention_mask`.

        padding: True or "longest", "max_length", False.
        truncation: cut each text to `max_length` tokens.
        """
        truncates = truncation not in (False, "do_not_truncate")
        texts = [text] if isinstance(text, str) else text
        rows = [self.encode(each, add_special_tokens, truncates, max_length) for each in texts]
        encoded = self.pad(
            {"input_ids": rows},
            padding=padding,
            max_length=max_length,
            return_tensors=return_tensors,
        )
        if not return_attention_mask:
            del encoded["attention_mask"]
        if isinstance(text, str) and return_tensors is None:
            return type(encoded)({name: values[0] for name, values in encoded.items()})
        return encoded

    def pad(
        self,
        encoded_inputs: Mapping[str, Sequence[TokenIds]] | Sequence[Mapping[str, TokenIds]],
        padding: bool | str = True,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Rows of `input_ids` (a mapping of lists, or a list of mappings) → rows of one length.

        The result has their `attention_mask`, too.
        Raises ConfigError: "max_length" without a length, or tensors of rows of several lengths.
        """
        from transformers import BatchEncoding

        # 1. The rows, and the length to which they are padded; longer ones stay.
        if isinstance(encoded_inputs, Mapping):
            rows = [_id_list(row) for row in encoded_inputs["input_ids"]]
        else:
            rows = [_id_list(encoded["input_ids"]) for encoded in encoded_inputs]
        length = 0
        if padding == "max_length":
            if max_length is None:
                raise ConfigError('padding="max_length" needs a max_length.')
            length = max_length
        elif padding not in (False, "do_not_pad"):
            length = max(map(len, rows), default=0)

        # 2. The padded rows, and 1 for each of their tokens.
        ids: list[list[int]] = []
        masks: list[list[int]] = []
        for row in rows:
            padding_ids = [self.pad_token_id] * (length - len(row))
            padding_mask = [0] * len(padding_ids)
            mask = [1] * len(row)
            if self.padding_side == "left":
                ids.append(padding_ids + row)
                masks.append(padding_mask + mask)
            else:
                ids.append(row + padding_ids)
                masks.append(mask + padding_mask)
        if return_tensors is not None and len(set(map(len, ids))) > 1:
            raise ConfigError(
                "The texts have several lengths, which no tensor can hold: set padding=True."
            )
        return BatchEncoding(
            {"input_ids": ids, "attention_mask": masks}, tensor_type=return_tensors
        )

    # ---- ids → text

    def decode(
        self,
        token_ids: TokenIds,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """Ids → text; the last argument has no effect, as with the original tokenizer's files."""
        return self.text.decode(_id_list(token_ids), skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self,
        sequences: Sequence[TokenIds] | np.ndarray | Tensor,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> list[str]:
        """Rows of ids → texts."""
        return [self.decode(row, skip_special_tokens) for row in sequences]


def _id_list(ids: TokenIds) -> list[int]:
    """One id, a list, an array or a tensor of ids as a list."""
    return [int(id) for id in torch.as_tensor(ids).flatten().tolist()]
