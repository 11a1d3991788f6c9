"""Text and images → token ids and back, equal to the slow LLaMA tokenizer of transformers 4.30.2.

The original models were trained with that version; later ones handle blanks around `<img>`, `</img>` and the codes
differently. The rules, on top of the `sentencepiece` package:

* encode: the text is split at special and added tokens, longest match first; white space next to an added token is
  stripped on both sides (not next to `<s>`, `</s>`, `<unk>`); each segment is encoded separately, so its first piece
  starts with the dummy blank.
* decode: text segments and added tokens are joined by single blanks; `</s>` is not an added token, so it stays in its
  segment, and a special token that is not first in its segment puts a blank BEFORE the segment so far (a quirk callers
  depend on).

A tokenizer folder has `tokenizer.model` (SentencePiece), `added_tokens.json` (token → id), and optionally
`special_tokens_map.json` (white space next to special tokens) and `tokenizer_config.json` (`tokens_per_image`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import sentencepiece as spm

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, CodesError, RequestError
from seed_multimodal.hub import SHIPPED_TOKENIZERS
from seed_multimodal.language.vocabulary import PATCH, Ids, ImageVocabulary, SeedXVocabulary

MODEL, ADDED, CONFIG, SPECIAL = (
    "tokenizer.model",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
Part = str | Sequence[int]
_CODE_WORD = re.compile(r"<img_[0-9]{5,}>")
_NUMBERED_WORD = re.compile(r"<(?:img_|loc-)[0-9]+>")  # image codes and SEED-X's locations
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


@dataclass
class TokenizerFiles:
    """The content of a tokenizer folder; without names of image tokens (LaVIT) the caller sets the vocabulary."""

    processor: spm.SentencePieceProcessor
    vocabulary: ImageVocabulary
    added: dict[str, int]
    special: dict[
        str, tuple[bool, bool]
    ]  # special token → whether white space is stripped before and after it
    config: dict[str, Any]
    raw: dict[str, bytes]  # file name → content, for saving


class MultimodalTokenizer:
    """A SentencePiece model with image tokens, and the original white space rules."""

    bos_id, eos_id = 1, 2
    unk_id = pad_id = 0  # the original tokenizer pads with <unk>
    names_image_tokens = True  # whether image tokens have names

    def __init__(self, files: TokenizerFiles) -> None:
        self._files = files
        self._sp = files.processor
        self.vocabulary: ImageVocabulary = files.vocabulary
        self._added_names = {id: name for name, id in files.added.items()}
        special_ids = {word: self.token_id(word) for word in files.special}
        self._special_ids = frozenset(special_ids.values())
        self._control = {**files.added, **special_ids}
        # One pattern for all numbered tokens, since thousands of alternatives would be slow.
        others = sorted(
            (word for word in self._control if not _NUMBERED_WORD.fullmatch(word)),
            key=len,
            reverse=True,
        )
        self._words = re.compile("|".join([_NUMBERED_WORD.pattern, *map(re.escape, others)]))

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

    def __len__(self) -> int:
        return self.vocabulary.size

    def token_id(self, word: str) -> int:
        """Id of a token (`▁hell`, `<img_00005>`); `unk_id` if unknown."""
        return self._files.added[word] if word in self._files.added else self._sp.PieceToId(word)

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """One string → ids, names of control words in it included; `add_bos` puts `<s>` in front."""
        pieces = self.split(plain_text(text))
        for place in range(1, len(pieces), 2):
            strip_left, strip_right = self._files.special.get(pieces[place], (True, True))
            if strip_left:
                pieces[place - 1] = pieces[place - 1].rstrip()
            if strip_right:
                pieces[place + 1] = pieces[place + 1].lstrip()
        ids = [self.bos_id] if add_bos else []
        for place, piece in enumerate(pieces):
            ids += [self._control[piece]] if place % 2 else self._sp.EncodeAsIds(piece)
        return ids

    def split(self, text: str) -> list[str]:
        """Segments of text and the control words between them; a segment (possibly empty) first and last."""
        pieces, start = list[str](), 0
        for match in self._words.finditer(text):
            if match[0] in self._control:  # <img_99999> matches the pattern, but is not a token
                pieces += [text[start : match.start()], match[0]]
                start = match.end()
        return [*pieces, text[start:]]

    def encode_parts(
        self, parts: Sequence[Part], strip: bool = True, add_bos: bool = False
    ) -> list[int]:
        """Texts, codes of images and `Ids` → ids; control tokens (`</s>`, `<img>`, …) in texts are plain text. `strip`:
        strip white space next to images, as the original tokenizer; `add_bos`: prepend `<s>`. Raises CodesError: not
        the codes of one image; RequestError: text that is not Unicode."""
        ids = [self.bos_id] if add_bos else []
        for place, part in enumerate(parts):
            if not isinstance(part, str):
                ids.extend(part if isinstance(part, Ids) else self.vocabulary.image_ids(part))
                continue
            if strip and place > 0 and not isinstance(parts[place - 1], str):
                part = part.lstrip()
            if strip and place + 1 < len(parts) and not isinstance(parts[place + 1], str):
                part = part.rstrip()
            ids.extend(self._sp.EncodeAsIds(plain_text(part)))
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Ids → text, with names of image tokens. Raises CodesError: an id outside the vocabulary."""
        texts: list[str] = []
        segment: list[int] = []
        for id in self.checked_ids(ids):
            if skip_special_tokens and id in self._special_ids:
                continue
            if id in self._added_names:
                texts += [self._decode_segment(segment)] if segment else []
                texts.append(self._added_names[id])
                segment = []
            else:
                segment.append(id)
        return " ".join([*texts, self._decode_segment(segment)] if segment else texts)

    def _decode_segment(self, ids: list[int]) -> str:
        text, pieces = "", list[int]()
        for place, id in enumerate(ids):
            if id not in self._special_ids:
                pieces.append(id)
                continue
            text += " " if place and ids[place - 1] not in self._special_ids else ""
            text += self._sp.DecodeIds(pieces) + self._sp.IdToPiece(id)
            pieces = []
        return text + self._sp.DecodeIds(pieces)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Ids → tokens (`▁hell`, `<0x0A>`, `<img_00005>`); raises as `decode`."""
        return [
            self._added_names[id] if id in self._added_names else self._sp.IdToPiece(id)
            for id in self.checked_ids(ids)
        ]

    def checked_ids(self, ids: Iterable[int]) -> list[int]:
        """A row of ids as ints. Raises CodesError: an id outside the vocabulary."""
        values = [int(id) for id in ids]
        if outside := [id for id in values if not 0 <= id < self.vocabulary.size]:
            raise CodesError(
                f"Token id {outside[0]} is outside the vocabulary of {self.vocabulary.size} tokens."
            )
        return values


def plain_text(text: str) -> str:
    """The text. Raises RequestError: lone surrogates (bytes that are not UTF-8)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("The text must be plain Unicode text.") from None
    return text


def read_files(folder: Path, names_image_tokens: bool = True) -> TokenizerFiles:
    """Read and check a tokenizer folder.

    names_image_tokens: if false, only `n_text` of the result's vocabulary counts.
    Raises `CheckpointError` for a missing or damaged file, and for tokens with wrong ids.
    """
    needed = (MODEL, ADDED) if names_image_tokens else (MODEL,)
    if not os.path.isdir(folder):
        raise CheckpointError(
            f"{folder}: no such tokenizer folder (it must have {' and '.join(needed)}); "
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
        raise CheckpointError(f"{folder / MODEL}: not a SentencePiece model.") from error
    if (processor.unk_id(), processor.bos_id(), processor.eos_id()) != (0, 1, 2):
        raise CheckpointError(f"{folder / MODEL}: <unk>, <s>, </s> must have ids 0, 1, 2.")
    added, config, entries = (
        read_json_object(folder / name) if name in raw else {} for name in (ADDED, CONFIG, SPECIAL)
    )
    vocabulary = ImageVocabulary(processor.GetPieceSize())
    if names_image_tokens:
        vocabulary = _vocabulary(
            added, vocabulary.n_text, config.get("tokens_per_image"), folder / ADDED
        )
    return TokenizerFiles(
        processor,
        vocabulary,
        added if names_image_tokens else {},
        _special_words(entries),
        config,
        raw,
    )


def _vocabulary(
    added: dict[str, int], n_text: int, per_image: int | None, file: Path
) -> ImageVocabulary:
    n_codes = sum(1 for name in added if _CODE_WORD.fullmatch(name))
    try:
        vocabulary = (
            SeedXVocabulary.of_words(added, n_text, int(per_image or 64))
            if PATCH in added
            else ImageVocabulary(n_text, n_codes, int(per_image or 32))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the image words cannot be read ({error!r}).") from error
    words = vocabulary.added_tokens
    if added != words:
        wrong = min(name for name in {*added, *words} if added.get(name) != words.get(name))
        raise CheckpointError(
            f"{file}: the word {wrong!r} has id {added.get(wrong)}, but with {n_text} text pieces "
            f"and {n_codes} codes it must have {words.get(wrong)}."
        )
    return vocabulary


def _special_words(entries: dict[str, Any]) -> dict[str, tuple[bool, bool]]:
    """Special token → whether white space is stripped before and after it: by the dictionary entry; on both sides for a
    plain string (as in transformers 4.30.2); on no side for LLaMA's own three."""
    values = [
        entry
        for value in entries.values()
        for entry in (value if isinstance(value, list) else [value])
    ]
    words = dict.fromkeys(NAMES.values(), (False, False))
    words |= {entry: (True, True) for entry in values if isinstance(entry, str)}
    return words | {
        entry["content"]: (bool(entry.get("lstrip")), bool(entry.get("rstrip")))
        for entry in reversed(values)
        if isinstance(entry, dict) and "content" in entry
    }
