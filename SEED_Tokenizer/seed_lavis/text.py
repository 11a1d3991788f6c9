"""Captions → word pieces for stage 1's text path.

    BERT       `bert-base-uncased` and one more word, `[DEC]`, as released: `[CLS] words [SEP] [PAD] …`
    nano       the shipped 2,000 pieces and one more id, the end: `<s> words END 0 …`

Which one a folder holds is seen by its files (`tokenizer.model`: nano's).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_lavis.options import locate
from seed_multimodal.errors import CheckpointError

BERT_WHERE = ("download bert-base-uncased (vocab.txt, tokenizer.json, tokenizer_config.json) from the Hugging Face hub "
              "and put it at pretrained/bert-base-uncased, or give its path as model.text_tokenizer")
Words = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


class BertWords:
    """Captions → ids and mask, int64 `[B, max_length]`; `size` counts the word pieces with `[DEC]`."""

    def __init__(self, source: str, max_length: int) -> None:
        from transformers import BertTokenizer

        place = Path(source)
        # transformers 5 makes an empty tokenizer of a folder without files.
        if place.is_dir() and not any((place / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
            raise CheckpointError(f"{source}: no BERT tokenizer there; {BERT_WHERE}.")
        try:
            self.tokenizer: Any = BertTokenizer.from_pretrained(source, truncation_side="right")
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if os.environ.get("HF_HUB_OFFLINE") != "1" else "downloads are off"
            raise CheckpointError(f"{source}: no BERT tokenizer there ({reason}); {BERT_WHERE}.") from error
        plain = len(self.tokenizer)
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        self.max_length, self.size = max_length, plain + 1
        if self.tokenizer.bos_token_id != plain or len(self.tokenizer) != self.size:
            raise CheckpointError(f"{source}: [DEC] became word {self.tokenizer.bos_token_id}, not {plain}, so this is "
                                  f"not the tokenizer of the released training; {BERT_WHERE}.")

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = self.tokenizer(list(captions), padding="max_length", truncation=True, max_length=self.max_length,
                               return_tensors="pt")
        return found["input_ids"], found["attention_mask"]


class NanoWords:
    """The same from the multimodal tokenizer of a nano system."""

    def __init__(self, folder: str, max_length: int) -> None:
        from seed_multimodal.language.tokenizer import MultimodalTokenizer

        self.tokenizer = MultimodalTokenizer.from_pretrained(folder)
        self.end = self.tokenizer.vocabulary.n_text
        self.max_length, self.size = max_length, self.end + 1

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(captions), self.max_length, dtype=torch.long)
        for row, caption in zip(ids, captions, strict=True):
            words = self.tokenizer.encode_parts([caption])[:self.max_length - 2]  # words only: no control ids
            line = [self.tokenizer.bos_id, *words, self.end]
            row[:len(line)] = torch.tensor(line)
        return ids, (ids > 0).long()


def caption_words(source: str, max_length: int) -> BertWords | NanoWords:
    """The tokenizer that `source` (folder or hub id) holds.

    Raises:
        CheckpointError: nothing there; the sentence says what to put where.
    """
    place = Path(locate(source))
    if (place / "tokenizer.model").is_file():
        return NanoWords(str(place), max_length)
    beside = locate(f"pretrained/{source}")
    return BertWords(beside if not place.exists() and Path(beside).is_dir() else str(place), max_length)
