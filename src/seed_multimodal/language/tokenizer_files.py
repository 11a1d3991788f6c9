"""A tokenizer folder on disk: reading, checking and writing it; and the training of its text pieces.

`tokenizer.model` (SentencePiece) and `added_tokens.json` (`<img_ddddd>`, `<img>`, `</img>` -> id) must be there.
`special_tokens_map.json` may define how white space is treated next to a special word (the lstrip/rstrip of a
dictionary entry; a plain string strips both sides, as in transformers 4.30.2). `tokenizer_config.json` may give
`tokens_per_image`.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece as spm

from seed_multimodal.disk import read_json_object, replace_text, replacing
from seed_multimodal.errors import CheckpointError, DataError, first_line
from seed_multimodal.language.vocabulary import BOI, EOI, PATCH, ImageVocabulary, SeedXVocabulary, code_token

MODEL, ADDED, CONFIG, SPECIAL = (
    "tokenizer.model", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
CODE_WORD = re.compile(r"<img_[0-9]{5,}>")
NUMBERED_WORD = re.compile(r"<(?:img_|loc-)[0-9]+>")  # image codes and SEED-X's locations
_DEFAULTS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


@dataclass(frozen=True)
class SpecialWord:
    """A special word and whether white space is dropped before (`lstrip`) and after (`rstrip`) it."""

    text: str
    lstrip: bool = False
    rstrip: bool = False


@dataclass
class TokenizerFiles:
    """The content of a tokenizer folder; `raw` holds the files' bytes, for writing them again."""

    processor: spm.SentencePieceProcessor
    vocabulary: ImageVocabulary
    added: dict[str, int]
    special: list[SpecialWord]
    raw: dict[str, bytes] = field(default_factory=dict)


def read_files(folder: Path) -> TokenizerFiles:
    """Read and check a tokenizer folder.

    Raises:
        CheckpointError: a file that is missing or damaged, or ids that leave the released layout.
    """
    processor, raw = _read(folder, (MODEL, ADDED))
    added = read_json_object(folder / ADDED)
    config = read_json_object(folder / CONFIG) if CONFIG in raw else {}
    n_codes = sum(1 for name in added if CODE_WORD.fullmatch(name))
    seed_x = PATCH in added
    per_image = config.get("tokens_per_image", 64 if seed_x else 32)
    if n_codes < 1 or not isinstance(per_image, int) or per_image < 1:
        raise CheckpointError(f"{folder}: needs at least one image word and one token per image "
                              f"(found {n_codes} and {per_image!r}).")
    n_text = processor.GetPieceSize()
    vocabulary = _seed_x(added, n_text, per_image, folder / ADDED) if seed_x else (
        ImageVocabulary(n_text, n_codes, per_image))
    _check_layout(added, vocabulary, folder / ADDED)
    if (folder / "config.json").is_file() and "codebook_size" in (sizes := read_json_object(folder / "config.json")):
        check_codebook(folder, vocabulary, sizes["codebook_size"], sizes.get("num_query", per_image), folder)
    return TokenizerFiles(processor, vocabulary, added, _special_of(folder, raw), raw)


def check_codebook(words: str | Path, vocabulary: ImageVocabulary, codes: int, per_image: int,
                   tokenizer: str | Path) -> None:
    """Refuse (`CheckpointError`) words for other codes than an image tokenizer has."""
    if (codes, per_image) != (vocabulary.n_codes, vocabulary.tokens_per_image):
        raise CheckpointError(f"{words}: has words for {vocabulary.n_codes} codes, {vocabulary.tokens_per_image} to a "
                              f"picture, but the image tokenizer {tokenizer} has {codes}, {per_image} to a picture; "
                              f"train stage 2 with model.n_embed={vocabulary.n_codes}, or take other words.")


def read_text_files(folder: Path, vocabulary: Callable[[int, dict[str, Any]], ImageVocabulary]) -> TokenizerFiles:
    """Read a folder without `added_tokens.json`: a plain LLaMA tokenizer, whose image words have no spelling (LaVIT).

    Args:
        vocabulary: the number of text pieces and the content of `tokenizer_config.json` → the words.

    Raises:
        CheckpointError: a file that is missing or damaged.
    """
    processor, raw = _read(folder, (MODEL,))
    words = vocabulary(processor.GetPieceSize(), read_json_object(folder / CONFIG) if CONFIG in raw else {})
    return TokenizerFiles(processor, words, {}, _special_of(folder, raw), raw)


def _read(folder: Path, needed: Sequence[str]) -> tuple[spm.SentencePieceProcessor, dict[str, bytes]]:
    """The SentencePiece model and the bytes of all files."""
    if not os.path.isdir(folder):  # Path.is_dir raises for a name too long
        raise CheckpointError(f"{folder}: there is no such tokenizer folder (it must hold {' and '.join(needed)}); "
                              "pretrained/README.md says where the released one comes from, pretrained/nano has one.")
    raw = {name: (folder / name).read_bytes() for name in (MODEL, ADDED, CONFIG, SPECIAL) if (folder / name).is_file()}
    for name in needed:
        if not raw.get(name):
            raise CheckpointError(f"{folder / name}: this tokenizer file is missing or empty.")
    processor = spm.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(raw[MODEL])
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{folder / MODEL}: not a SentencePiece model.") from error
    if (processor.unk_id(), processor.bos_id(), processor.eos_id()) != (0, 1, 2):
        raise CheckpointError(f"{folder / MODEL}: <unk>, <s>, </s> must have ids 0, 1, 2, not {processor.unk_id()}, "
                              f"{processor.bos_id()}, {processor.eos_id()}.")
    return processor, raw


def _special_of(folder: Path, raw: dict[str, bytes]) -> list[SpecialWord]:
    return _special_words(read_json_object(folder / SPECIAL) if SPECIAL in raw else {})


def _check_layout(added: dict[str, int], vocabulary: ImageVocabulary, file: Path) -> None:
    """Codes right after the text pieces, in order, then the two brackets; nothing else."""
    wanted = added_words(vocabulary)
    if added == wanted:
        return
    for name in (BOI, EOI):
        if name not in added:
            raise CheckpointError(f"{file}: the word {name!r} is missing.")
    wrong = next(name for name in sorted(set(added) | set(wanted)) if added.get(name) != wanted.get(name))
    raise CheckpointError(f"{file}: the word {wrong!r} has id {added.get(wrong)}, but with {vocabulary.n_text} text "
                          f"pieces and {vocabulary.n_codes} codes it must have {wanted.get(wrong)}.")


def _seed_x(added: dict[str, int], n_text: int, per_image: int, file: Path) -> SeedXVocabulary:
    """SEED-X's words in whatever order the file has them; behind 32,000 text pieces only in the released one."""
    try:
        found = SeedXVocabulary.of_words(added, n_text, per_image)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: SEED-X's word {first_line(error)} is missing or has no number.") from error
    if n_text == SeedXVocabulary.n_text:
        found = SeedXVocabulary(tokens_per_image=per_image)
    if found.tokens_per_image > found.n_codes:
        raise CheckpointError(f"{file}: a picture takes {per_image} words, but there are {found.n_codes} image words.")
    if sorted(found.words.values()) != list(range(n_text, found.size)):
        raise CheckpointError(f"{file}: the words' ids are not those from {n_text} to {found.size - 1}, each once.")
    return found


def added_words(vocabulary: ImageVocabulary) -> dict[str, int]:
    """The content of `added_tokens.json` for a vocabulary."""
    if isinstance(vocabulary, SeedXVocabulary):
        return vocabulary.words
    words = {code_token(code): vocabulary.n_text + code for code in range(vocabulary.n_codes)}
    return {**words, BOI: vocabulary.boi_id, EOI: vocabulary.eoi_id}


def _special_words(entries: dict[str, Any]) -> list[SpecialWord]:
    """The special words; LLaMA's three are always there and strip nothing unless set in the file."""
    found: dict[str, SpecialWord] = {}
    plain: list[str] = []
    for value in entries.values():
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, dict) and isinstance(entry.get("content"), str):
                found.setdefault(entry["content"], SpecialWord(
                    entry["content"], bool(entry.get("lstrip", False)), bool(entry.get("rstrip", False))))
            elif isinstance(entry, str):
                plain.append(entry)
    for text in plain:
        found.setdefault(text, SpecialWord(text, lstrip=True, rstrip=True))
    for text in _DEFAULTS.values():
        found.setdefault(text, SpecialWord(text))
    return list(found.values())


def write_files(folder: Path, model: bytes, n_codes: int, tokens_per_image: int, n_locations: int = 0,
                spelled: bool = True) -> None:
    """Write a tokenizer folder around a SentencePiece model, readable by transformers' LlamaTokenizer too (with
    locations, of SEED-X's words); the model comes last, so that a folder that has it is whole.

    Without `spelled` the image words get no names (LaVIT): `tokenizer_config.json` says how many there are.
    """
    processor = spm.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    n_text = processor.GetPieceSize()
    vocabulary = SeedXVocabulary.after(n_text, tokens_per_image, n_codes, n_locations) if n_locations else (
        ImageVocabulary(n_text, n_codes, tokens_per_image))
    special = {key: {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
               for key, text in _DEFAULTS.items()}
    config = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
        "clean_up_tokenization_spaces": False, "pad_token": None, "legacy": True, "sp_model_kwargs": {},
        "tokens_per_image": tokens_per_image,
        **{key: {"__type": "AddedToken", **entry} for key, entry in special.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {ADDED: added_words(vocabulary), SPECIAL: special, CONFIG: config}
    if not spelled:
        del files[ADDED]
        config["image_codes"] = n_codes
    for name, content in files.items():
        replace_text(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    with replacing(folder / MODEL) as handle:
        handle.write(model)


def train_model(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model with LLaMA's settings: byte fallback, dummy blank, digits apart, no normalisation.

    Raises:
        DataError: no text, or `vocab_size` cannot be reached with it.
    """
    sentences = [line for text in texts for line in text.split("\n") if line.strip()]
    if not sentences:
        raise DataError("There is no text to learn a tokenizer from.")
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.Train(
            sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, character_coverage=0.9999, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            add_dummy_prefix=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
            split_digits=True, allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2,
            max_sentence_length=1 << 16)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise DataError(f"A tokenizer of {vocab_size} pieces cannot be learnt from {len(sentences)} lines: {reason}"
                        ) from error
    return model.getvalue()
