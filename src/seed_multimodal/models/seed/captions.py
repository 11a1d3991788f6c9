"""Caption tokenization of stage 1: LAVIS's text clean-up, then word pieces of a tokenizer.

BERT         `bert-base-uncased` and `[DEC]`, as in the original: `[CLS] pieces [SEP] [PAD] …`
multimodal   text tokens of a multimodal tokenizer and an end id: `<s> pieces END 0 …`
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from seed_multimodal.errors import CheckpointError
from seed_multimodal.language.tokenizer import MODEL, MultimodalTokenizer
from seed_multimodal.settings import check_settings, positive

if TYPE_CHECKING:
    from transformers import BertTokenizer

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_WHITESPACE_RUNS = re.compile(r"\s{2,}")


def caption_text(caption: str, prompt: str = "", max_words: int = 50) -> str:
    """Lower case, punctuation replaced by blanks, white space collapsed, cut to `max_words` words.

    As in LAVIS's `blip_caption` a single tab or newline inside a caption survives.
    """
    text = _PUNCTUATION.sub(" ", caption.lower())
    text = _WHITESPACE_RUNS.sub(" ", text)
    text = text.rstrip("\n").strip(" ")
    return prompt + _first_words(text, max_words)


@dataclass(frozen=True)
class BlipCaption:
    """`caption_text` with its settings."""

    prompt: str = ""
    max_words: int = positive(50)

    def __post_init__(self) -> None:
        check_settings(self, "caption")

    def __call__(self, caption: str) -> str:
        return caption_text(caption, prompt=self.prompt, max_words=self.max_words)


def question_text(question: str, max_words: int) -> str:
    """Lower case, punctuation and trailing blanks removed, as in LAVIS's `blip_question`."""
    text = _PUNCTUATION.sub("", question.lower()).rstrip(" ")
    return _first_words(text, max_words)


def _first_words(text: str, count: int) -> str:
    return " ".join(text.split(" ")[:count])


class BertCaptionTokenizer:
    """Captions → ids and mask, int64 `[B, L]`, by BERT's tokenizer.

    source: folder or hub id.
    max_length: longer captions are cut.
    full: pad to `max_length`, as in training; False: to the longest caption.

    `size` counts the word pieces.
    """

    def __init__(self, source: str | Path, max_length: int, full: bool = True) -> None:
        from transformers import BertTokenizer

        self.max_length = max_length
        self.full = full
        try:
            self.tokenizer: BertTokenizer = BertTokenizer.from_pretrained(
                str(source), truncation_side="right"
            )
            # Without any files transformers 5 builds an empty tokenizer.
            if len(self.tokenizer) <= len(self.tokenizer.all_special_tokens):
                raise ValueError("the tokenizer is empty")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{source}: no BERT tokenizer there; download bert-base-uncased from the Hugging "
                f"Face hub to pretrained/bert-base-uncased, or give its folder."
            ) from error
        self.size = len(self.tokenizer)
        if "[DEC]" not in self.tokenizer.get_vocab():
            self.size += 1  # the original's word table has a row for it

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
    """As `BertCaptionTokenizer`, by the text tokens of a multimodal tokenizer; 0 is padding."""

    def __init__(self, source: str | Path, max_length: int, full: bool = True) -> None:
        self.max_length = max_length
        self.full = full
        self.tokenizer = MultimodalTokenizer.from_pretrained(source)
        self.end = self.tokenizer.vocabulary.n_text  # the first id after the text tokens
        self.size = self.end + 1

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows: list[Tensor] = []
        for caption in captions:
            # `<s>` and the end take two of the positions.
            pieces = self.tokenizer.encode_parts([caption])[: self.max_length - 2]
            ids = [self.tokenizer.bos_token_id, *pieces, self.end]
            rows.append(torch.tensor(ids, dtype=torch.long, device="cpu"))
        # Shorter captions are padded with 0.
        ids = pad_sequence(rows, batch_first=True)
        if self.full:
            ids = F.pad(ids, (0, self.max_length - ids.shape[1]))
        return ids, (ids > 0).long()


def load_caption_tokenizer(
    source: str | Path, max_length: int, full: bool = True
) -> BertCaptionTokenizer | MultimodalCaptionTokenizer:
    """The tokenizer in `source` (folder or hub id); raises `CheckpointError` if there is none."""
    if (Path(source) / MODEL).is_file():
        return MultimodalCaptionTokenizer(source, max_length, full)
    return BertCaptionTokenizer(source, max_length, full)
