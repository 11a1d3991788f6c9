"""Captions → word pieces for the Q-Former's text path.

    BERT       `bert-base-uncased` and one more word, `[DEC]`, as released: `[CLS] words [SEP] [PAD] …`
    ours       a multimodal tokenizer's text pieces and one more id, the end: `<s> words END 0 …`

The folder's files decide (`tokenizer.model`: ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError
from seed_multimodal.language.tokenizer import MultimodalTokenizer

BERT_WHERE = ("download bert-base-uncased (vocab.txt, tokenizer.json, tokenizer_config.json) from the Hugging Face hub "
              "and put it at pretrained/bert-base-uncased, or give its path as the text tokenizer")


class BertWords:
    """Captions → ids and mask, int64 `[B, L]`; `size` counts the word pieces with `[DEC]`.

    Args:
        source: folder or hub id.
        max_length: longer captions are cut.
        full: pad to `max_length` (as in training); else to the longest of the batch.

    Raises:
        CheckpointError: no BERT tokenizer there.
    """

    def __init__(self, source: str | Path, max_length: int, full: bool = True) -> None:
        from transformers import BertTokenizer

        try:
            self.tokenizer: Any = BertTokenizer.from_pretrained(str(source), truncation_side="right")
            if len(self.tokenizer) <= len(self.tokenizer.all_special_tokens):
                raise ValueError("empty: what transformers 5 makes of no files")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{source}: no BERT tokenizer there; {BERT_WHERE}.") from error
        # [DEC] starts captions that are written, which no stage here does; it only has a row in the word table.
        self.size = len(self.tokenizer) + ("[DEC]" not in self.tokenizer.get_vocab())
        self.max_length, self.full = max_length, full

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = self.tokenizer(list(captions), padding="max_length" if self.full else True, truncation=True,
                               max_length=self.max_length, return_tensors="pt")
        return found["input_ids"], found["attention_mask"]


class PieceWords:
    """The same from a multimodal tokenizer's folder; 0 is padding."""

    def __init__(self, source: str | Path, max_length: int, full: bool = True) -> None:
        self.tokenizer = MultimodalTokenizer.from_pretrained(source)
        self.end = self.tokenizer.vocabulary.n_text
        self.size = self.end + 1
        self.max_length, self.full = max_length, full

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [[self.tokenizer.bos_id, *self.tokenizer.encode_parts([caption])[:self.max_length - 2], self.end]
                for caption in captions]  # words only: no control ids
        ids = torch.zeros(len(rows), self.max_length if self.full else max(map(len, rows)), dtype=torch.long)
        for line, row in zip(ids, rows, strict=True):
            line[:len(row)] = torch.tensor(row)
        return ids, (ids > 0).long()


def open_words(source: str | Path, max_length: int, full: bool = True) -> BertWords | PieceWords:
    """The tokenizer that `source` (folder or hub id) holds; raises `CheckpointError` if there is none."""
    ours = (Path(source) / "tokenizer.model").is_file()
    return PieceWords(source, max_length, full) if ours else BertWords(source, max_length, full)
