"""Caption tokenization of stage 1: LAVIS's text clean-up, then word pieces of BERT or of a multimodal tokenizer.

BERT            `bert-base-uncased` and one more token, `[DEC]`, as in the original: `[CLS] words [SEP] [PAD] …`
own tokenizer   its text tokens and an end id: `<s> words END 0 …`
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError
from seed_multimodal.language.tokenizer import MODEL, MultimodalTokenizer
from seed_multimodal.settings import check_settings, setting

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_RUNS = re.compile(r"\s{2,}")


def caption_text(caption: str, prompt: str = "", max_words: int = 50) -> str:
    """Lower case, punctuation replaced by blanks, white space collapsed, the first `max_words` words.
    As in LAVIS's `blip_caption` a single tab or newline inside a caption survives."""
    text = _PUNCTUATION.sub(" ", caption.lower())
    text = _RUNS.sub(" ", text).rstrip("\n").strip(" ")
    return prompt + " ".join(text.split(" ")[:max_words])


@dataclass(frozen=True)
class BlipCaption:
    """`caption_text` with its settings."""

    prompt: str = ""
    max_words: int = setting(50, minimum=1)

    def __post_init__(self) -> None:
        check_settings(self, "caption")

    def __call__(self, caption: str) -> str:
        return caption_text(caption, prompt=self.prompt, max_words=self.max_words)


def question_text(question: str, max_words: int = 50) -> str:
    """Lower case, punctuation removed, white space kept but for trailing blanks (LAVIS's `blip_question`)."""
    return " ".join(_PUNCTUATION.sub("", question.lower()).rstrip(" ").split(" ")[:max_words])


class BertCaptionTokenizer:
    """Captions → ids and mask, int64 `[B, L]`, cut at `max_length` and padded to it (`full`, as in training) or to the
    longest; `size` counts the word pieces."""

    def __init__(self, source: str | Path, max_length: int, full: bool = True) -> None:
        from transformers import BertTokenizer

        try:
            self.tokenizer: Any = BertTokenizer.from_pretrained(
                str(source), truncation_side="right"
            )
            if len(self.tokenizer) <= len(self.tokenizer.all_special_tokens):
                raise ValueError("empty: what transformers 5 makes of no files")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{source}: no BERT tokenizer there; download bert-base-uncased from the Hugging "
                f"Face hub to pretrained/bert-base-uncased, or give its folder."
            ) from error
        self.size = len(self.tokenizer) + (
            "[DEC]" not in self.tokenizer.get_vocab()
        )  # a row of the word table
        self.max_length, self.full = max_length, full

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        batch = self.tokenizer(
            list(captions),
            padding="max_length" if self.full else True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return batch["input_ids"], batch["attention_mask"]


class MultimodalCaptionTokenizer:
    """Word pieces of a multimodal tokenizer's folder; 0 is padding."""

    def __init__(self, source: str | Path, max_length: int, full: bool = True) -> None:
        self.tokenizer = MultimodalTokenizer.from_pretrained(source)
        self.end = self.tokenizer.vocabulary.n_text
        self.size = self.end + 1
        self.max_length, self.full = max_length, full

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [
            [
                self.tokenizer.bos_id,
                *self.tokenizer.encode_parts([caption])[: self.max_length - 2],
                self.end,
            ]
            for caption in captions
        ]  # text only, no control ids
        ids = torch.zeros(
            len(rows), self.max_length if self.full else max(map(len, rows)), dtype=torch.long
        )
        for line, row in zip(ids, rows, strict=True):
            line[: len(row)] = torch.tensor(row)
        return ids, (ids > 0).long()


def load_caption_tokenizer(
    source: str | Path, max_length: int, full: bool = True
) -> BertCaptionTokenizer | MultimodalCaptionTokenizer:
    """The tokenizer in `source` (folder or hub id); raises `CheckpointError` if there is none."""
    kind = MultimodalCaptionTokenizer if (Path(source) / MODEL).is_file() else BertCaptionTokenizer
    return kind(source, max_length, full)
