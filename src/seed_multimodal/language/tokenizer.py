"""Text and images → token ids and back, equal to the slow LLaMA tokenizer of transformers 4.30.2.

The original models were trained with that version; later ones handle blanks around `<img>`,
`</img>` and the codes differently. The rules, on top of the `sentencepiece` package:

* encode: the text is split at special and added tokens, longest match first; white space next to an
  added token is stripped on both sides (not next to `<s>`, `</s>`, `<unk>`); each segment is
  encoded separately, so its first piece starts with the dummy blank.
* decode: text segments and added tokens are joined by single blanks; `</s>` is not an added token,
  so it stays in its segment, and a special token that is not first in its segment puts a blank
  BEFORE the segment so far (a quirk callers depend on).

A tokenizer folder has `tokenizer.model` (SentencePiece), `added_tokens.json` (token → id), and
optionally `special_tokens_map.json` (white space next to special tokens) and
`tokenizer_config.json` (`tokens_per_image`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import sentencepiece as spm

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, name_content
from seed_multimodal.language.text_tokenizer import LLAMA_IDS, SpecialIds, TextTokenizer
from seed_multimodal.language.vocabulary import PATCH, ImageVocabulary, SeedXVocabulary
from seed_multimodal.weights.catalogue import SHIPPED_TOKENIZERS

# Files of a tokenizer folder.
MODEL = "tokenizer.model"
ADDED = "added_tokens.json"
CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
# Entries of `special_tokens_map.json`: LLaMA's own three tokens.
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_CODE_TOKEN = re.compile(r"<img_[0-9]{5,}>")


@dataclass
class TokenizerFiles:
    """The content of a tokenizer folder.

    vocabulary: set by the caller if the files do not name image tokens (LaVIT).
    added: added token → id.
    special: special token → whether white space is stripped before and after it.
    raw: file name → content, for saving.
    """

    processor: spm.SentencePieceProcessor
    vocabulary: ImageVocabulary
    added: dict[str, int]
    special: dict[str, tuple[bool, bool]]
    config: dict[str, Any]
    raw: dict[str, bytes]


class MultimodalTokenizer(TextTokenizer):
    """A SentencePiece model with image tokens, and the original white space rules."""

    bos_token_id = 1
    eos_token_ids = (2,)
    unk_token_id = 0
    pad_token_id = 0  # the original tokenizer pads with <unk>
    start_ids: tuple[int, ...] = (bos_token_id,)
    special_ids: SpecialIds = LLAMA_IDS  # LaVIT's too, which pads with `</s>`
    strips_at_images = True
    joiner = " "

    def __init__(self, files: TokenizerFiles) -> None:
        self._files = files
        self._sp = files.processor
        super().__init__(
            files.vocabulary,
            self._sp.GetPieceSize(),
            files.added,
            {token: self.token_id(token) for token in files.special},
            files.special,
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a folder. Raises CheckpointError: a missing or damaged file, or other token ids."""
        return cls(read_files(Path(folder)))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the folder's original files."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.raw.items():
            (target / name).write_bytes(content)
        return target

    def token_id(self, token: str) -> int:
        if token in self._files.added:
            return self._files.added[token]
        return self._sp.PieceToId(token)

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = self._sp.EncodeAsIds(text)
        return ids

    def _decode_text(self, ids: list[int]) -> str:
        text = ""
        pieces: list[int] = []
        for index, id in enumerate(ids):
            if id not in self._special_ids:
                pieces.append(id)
                continue
            if index > 0 and ids[index - 1] not in self._special_ids:
                text += " "
            text += self._sp.DecodeIds(pieces) + self._sp.IdToPiece(id)
            pieces = []
        last_text: str = self._sp.DecodeIds(pieces)
        return text + last_text

    def _text_token(self, id: int) -> str:
        return self._sp.IdToPiece(id)


def read_files(folder: Path, names_image_tokens: bool = True) -> TokenizerFiles:
    """Read and check a tokenizer folder.

    names_image_tokens: if false, only `n_text` of the result's vocabulary counts.
    Raises `CheckpointError` for a missing or damaged file, and for tokens with wrong ids.
    """
    # 1. The files, of which two may be missing; a LaVIT folder names no image tokens.
    needed = (MODEL, ADDED) if names_image_tokens else (MODEL,)
    if not any((folder / name).is_file() for name in needed):
        raise CheckpointError(
            f"{folder}: no tokenizer folder (it must have {' and '.join(needed)}); "
            f"pretrained/README.md lists the original ones; {SHIPPED_TOKENIZERS}."
        )
    raw = {
        name: (folder / name).read_bytes()
        for name in (MODEL, ADDED, CONFIG, SPECIAL)
        if (folder / name).is_file()
    }
    for name in needed:
        if not raw.get(name):
            raise CheckpointError(f"{folder / name}: this tokenizer file is missing or empty.")
    processor = spm.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(raw[MODEL])
    except (RuntimeError, OSError) as error:
        content = name_content(folder / MODEL) or "no SentencePiece model"
        raise CheckpointError(f"{folder / MODEL}: is {content}.") from error
    if (processor.unk_id(), processor.bos_id(), processor.eos_id()) != (0, 1, 2):
        raise CheckpointError(f"{folder / MODEL}: <unk>, <s>, </s> must have ids 0, 1, 2.")

    # 2. The added tokens determine the vocabulary.
    added = _read_optional(folder / ADDED)
    config = _read_optional(folder / CONFIG)
    special = _special_tokens(_read_optional(folder / SPECIAL))
    n_text = processor.GetPieceSize()
    if not names_image_tokens:
        return TokenizerFiles(processor, ImageVocabulary(n_text), {}, special, config, raw)
    vocabulary = _vocabulary(added, n_text, config.get("tokens_per_image"), folder / ADDED)
    return TokenizerFiles(processor, vocabulary, added, special, config, raw)


def _read_optional(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no file."""
    return read_json_object(file) if file.is_file() else {}


def _vocabulary(
    added: dict[str, int], n_text: int, tokens_per_image: int | None, file: Path
) -> ImageVocabulary:
    """The vocabulary of a tokenizer's added tokens, which must have the ids of its layout."""
    # 1. The layout: SEED-X's has tokens for views of images.
    n_codes = sum(1 for token in added if _CODE_TOKEN.fullmatch(token))
    vocabulary: ImageVocabulary
    try:
        if PATCH in added:
            vocabulary = SeedXVocabulary.from_added_tokens(
                added, n_text, int(tokens_per_image or 64)
            )
        else:
            vocabulary = ImageVocabulary(n_text, n_codes, int(tokens_per_image or 32))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the image tokens cannot be read ({error!r}).") from error

    # 2. The ids.
    expected = vocabulary.added_tokens
    if added != expected:
        tokens = {*added, *expected}
        wrong = min(token for token in tokens if added.get(token) != expected.get(token))
        raise CheckpointError(
            f"{file}: the token {wrong!r} has id {added.get(wrong)}, but with {n_text} text pieces "
            f"and {n_codes} codes it must have {expected.get(wrong)}."
        )
    return vocabulary


def _special_tokens(entries: dict[str, Any]) -> dict[str, tuple[bool, bool]]:
    """Special token → whether white space is stripped before and after it.

    Stripped by the dictionary entry; on both sides for a plain string (as in transformers 4.30.2);
    on no side for LLaMA's own three.
    """
    flat: list[Any] = []
    for entry in entries.values():
        flat += entry if isinstance(entry, list) else [entry]

    special = dict.fromkeys(SPECIAL_TOKENS.values(), (False, False))
    for entry in flat:
        if isinstance(entry, str):
            special[entry] = (True, True)
    for entry in reversed(flat):  # the first entry of a token counts
        if isinstance(entry, dict) and "content" in entry:
            special[entry["content"]] = (bool(entry.get("lstrip")), bool(entry.get("rstrip")))
    return special
