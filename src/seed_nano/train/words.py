"""A LLaMA-style text tokenizer, with image tokens after the text tokens."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TypeVar

import sentencepiece as spm

from seed_multimodal.disk import JsonObject, atomic_open, replace_text
from seed_multimodal.language.tokenizer import (
    ADDED,
    CONFIG,
    MODEL,
    SPECIAL,
    SPECIAL_TOKENS,
    MultimodalTokenizer,
)
from seed_multimodal.language.vocabulary import ImageVocabulary, SeedXVocabulary

Tokenizer = TypeVar("Tokenizer", bound=MultimodalTokenizer)


def train_text_tokenizer(
    kind: type[Tokenizer],
    texts: Iterable[str],
    folder: str | Path,
    vocab_size: int,
    n_codes: int,
    tokens_per_image: int = 32,
    n_locations: int = 0,
) -> Tokenizer:
    """Learn a byte-fallback BPE model with LLaMA's settings from `texts`, write a tokenizer folder
    and return the tokenizer of class `kind`: `vocab_size` text pieces (those of bytes and control
    words included), `n_codes` image words on top, and, with `n_locations` places on a side of the
    grid of boxes, SEED-X's words."""
    lines = chain.from_iterable(text.split("\n") for text in texts)
    model = io.BytesIO()
    spm.SentencePieceTrainer.Train(
        sentence_iterator=filter(str.strip, lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.9999,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
        max_sentence_length=1 << 16,
    )
    names = kind.names_image_tokens
    write_files(Path(folder), model.getvalue(), n_codes, tokens_per_image, n_locations, names)
    return kind.from_pretrained(folder)


def write_files(
    folder: Path,
    model: bytes,
    n_codes: int,
    tokens_per_image: int,
    n_locations: int = 0,
    names_image_tokens: bool = True,
) -> None:
    """Write a tokenizer folder around a SentencePiece model (with locations, of SEED-X's words),
    readable by transformers' LlamaTokenizer, too; without `names_image_tokens` the image words have
    no names (LaVIT)."""
    processor = spm.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    n_text = processor.GetPieceSize()
    vocabulary = ImageVocabulary(n_text, n_codes, tokens_per_image)
    if n_locations:
        vocabulary = SeedXVocabulary.behind(n_text, n_codes, tokens_per_image, n_locations)
    # Settings of transformers' tokenizer, and ours.
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {key: {"content": text, **flags} for key, text in SPECIAL_TOKENS.items()}
    config: JsonObject = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "pad_token": None,
        "legacy": True,
        "sp_model_kwargs": {},
        "tokens_per_image": tokens_per_image,
    }
    files: dict[str, JsonObject] = {SPECIAL: special, CONFIG: config}
    if names_image_tokens:
        files[ADDED] = vocabulary.added_tokens
    else:
        config["image_codes"] = n_codes
    for key, entry in special.items():
        config[key] = {"__type": "AddedToken", **entry}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        replace_text(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    with atomic_open(folder / MODEL) as handle:  # last: a folder that has it is complete
        handle.write(model)
