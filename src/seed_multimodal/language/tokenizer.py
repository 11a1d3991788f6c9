"""Text and pictures -> token ids and back, exactly as the slow LLaMA tokenizer of transformers 4.30.2 did it.

The released models were trained with that version; later ones treat the blanks around `<img>`, `</img>` and the codes
differently and give ids the models never saw. The rules, on the plain `sentencepiece` package:

* encode: the text is cut at every special or added word, longest match first; white space next to an added word is
  dropped on both sides (not next to `<s>`, `</s>`, `<unk>`); each remaining stretch is encoded on its own, so its first
  piece starts with the dummy blank.
* decode: stretches of ordinary pieces and every added word are joined by single blanks; `</s>` is no added word, so it
  is written inside its stretch, and a special word that does not open its stretch puts a blank BEFORE the stretch
  so far (a quirk callers depend on).

`encode` turns the names of control words in the text into control ids. Text typed by users goes through
`encode_parts`, which does not.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from seed_multimodal.errors import CodesError, RequestError, first_line
from seed_multimodal.language.tokenizer_files import (
    NUMBERED_WORD,
    TokenizerFiles,
    read_files,
    train_model,
    write_files,
)
from seed_multimodal.language.vocabulary import Ids, ImageVocabulary

Part = str | Sequence[int]


class MultimodalTokenizer:
    """A SentencePiece model, the image words on top, and the released rules of white space."""

    bos_id = 1
    eos_id = 2
    pad_id = 0  # the released tokenizer pads with <unk>
    unk_id = 0

    def __init__(self, files: TokenizerFiles) -> None:
        """Wrap what `tokenizer_files.read_files` read; use `from_pretrained` or `train`."""
        self._files = files
        self._sp = files.processor
        self.vocabulary: ImageVocabulary = files.vocabulary
        self._added = dict(files.added)
        self._added_names = {id: name for name, id in files.added.items()}
        self._special = {word.text: word for word in files.special}
        special_ids = {word.text: self.word_id(word.text) for word in files.special}
        self._special_ids = frozenset(special_ids.values())
        self._control = {**self._added, **special_ids}
        # Numbered words by their shape: an alternative for each of thousands would be tried one by one.
        others = sorted((word for word in self._control if not NUMBERED_WORD.fullmatch(word)), key=len, reverse=True)
        self._words = re.compile("|".join([NUMBERED_WORD.pattern, *(re.escape(word) for word in others)]))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MultimodalTokenizer:
        """Read `tokenizer.model`, `added_tokens.json` and the optional configuration files of a folder.

        Raises:
            CheckpointError: a file that is missing, damaged, or numbers the image words otherwise.
        """
        return cls(read_files(Path(folder)))

    @classmethod
    def train(
        cls, texts: Iterable[str], folder: str | Path, vocab_size: int, n_codes: int, tokens_per_image: int = 32,
        n_locations: int = 0,
    ) -> MultimodalTokenizer:
        """Learn a byte-fallback BPE model with LLaMA's settings from `texts`, write a tokenizer folder, read it back.

        Args:
            vocab_size: text pieces, the 259 of bytes and control words included.
            n_codes: image words put on top.
            n_locations: places on a side of the grid of boxes; with some, the words are SEED-X's.

        Raises:
            DataError: `vocab_size` does not fit the texts.
        """
        model = train_model(texts, vocab_size)
        write_files(Path(folder), model, n_codes, tokens_per_image, n_locations)
        return cls.from_pretrained(folder)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the folder again (as it was read)."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.raw.items():
            (target / name).write_bytes(content)
        return target

    def __len__(self) -> int:
        return self.vocabulary.size

    def word_id(self, word: str) -> int:
        """Id of a piece or word (`▁hell`, `<img_00005>`); `unk_id` for what is none."""
        found = self._added.get(plain_text(word))
        return self._sp.PieceToId(word) if found is None else found

    # ---------------------------------------------------------------------------------------------- encoding

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """One string -> ids, control words in it included; `add_bos` puts `<s>` in front.

        Raises:
            RequestError: no text, or one that is not Unicode.
        """
        ids = [self.bos_id] if add_bos else []
        pieces = self._cut(plain_text(text))  # text, word, text, word, …, text
        for place in range(1, len(pieces), 2):
            strip_left, strip_right = self._strips(pieces[place])
            if strip_left:
                pieces[place - 1] = pieces[place - 1].rstrip()
            if strip_right:
                pieces[place + 1] = pieces[place + 1].lstrip()
        for place, piece in enumerate(pieces):
            if place % 2:
                ids.append(self._control[piece])
            elif piece:
                ids.extend(self._sp.EncodeAsIds(piece))
        return ids

    def control_words(self, text: str) -> list[str]:
        """Names of control words that `encode` would read in a text, in their order."""
        return self._cut(text)[1::2]

    def _cut(self, text: str) -> list[str]:
        """Stretches of text and control words in turn, a stretch (possibly empty) first and last."""
        pieces: list[str] = []
        start = 0
        for match in self._words.finditer(text):
            if match[0] in self._control:  # <img_99999> may have the shape, but is no word
                pieces += [text[start:match.start()], match[0]]
                start = match.end()
        return [*pieces, text[start:]]

    def _strips(self, word: str) -> tuple[bool, bool]:
        special = self._special.get(word)
        return (special.lstrip, special.rstrip) if special is not None else (True, True)

    def encode_parts(
        self, parts: Sequence[Part], strip: bool = True, allow_control: bool = False, add_bos: bool = False
    ) -> list[int]:
        """A list of text spans and pictures -> ids.

        Args:
            parts: a string is one span, encoded on its own; a sequence of ints is the codes of one picture; `Ids` are
                put in as they are.
            strip: drop white space next to pictures, as the released tokenizer does.
            allow_control: read control words (`</s>`, `<img>`, …) in the text; by default they are ordinary letters.
            add_bos: put `<s>` in front.

        Raises:
            CodesError: a picture without exactly `tokens_per_image` codes of the codebook.
            RequestError: a text that is not Unicode.
        """
        ids = [self.bos_id] if add_bos else []
        for place, part in enumerate(parts):
            if not isinstance(part, str):
                ids.extend(part if isinstance(part, Ids) else self.vocabulary.image_ids([int(code) for code in part]))
                continue
            if strip and place > 0 and not isinstance(parts[place - 1], str):
                part = part.lstrip()
            if strip and place + 1 < len(parts) and not isinstance(parts[place + 1], str):
                part = part.rstrip()
            if part:
                ids.extend(self.encode(part) if allow_control else self._sp.EncodeAsIds(plain_text(part)))
        return ids

    # ---------------------------------------------------------------------------------------------- decoding

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Ids -> text with image words written out and blanks as transformers 4.30.2 places them.

        Raises:
            CodesError: what is no id, or one outside the vocabulary.
        """
        texts: list[str] = []
        stretch: list[int] = []
        for id in self.checked_ids(ids):
            if skip_special_tokens and id in self._special_ids:
                continue
            if id in self._added_names:
                if stretch:
                    texts.append(self._decode_stretch(stretch))
                    stretch = []
                texts.append(self._added_names[id])
            else:
                stretch.append(id)
        if stretch:
            texts.append(self._decode_stretch(stretch))
        return " ".join(texts)

    def _decode_stretch(self, ids: list[int]) -> str:
        text = ""
        pieces: list[int] = []
        after_special = False
        for place, id in enumerate(ids):
            if id not in self._special_ids:
                pieces.append(id)
                after_special = False
                continue
            if place and not after_special:
                text += " "
            text += self._sp.DecodeIds(pieces) + self._sp.IdToPiece(id)
            pieces = []
            after_special = True
        return text + self._sp.DecodeIds(pieces)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Ids -> their pieces or words (`▁hell`, `<0x0A>`, `<img_00005>`); raises as `decode`."""
        return [self._added_names[id] if id in self._added_names else self._sp.IdToPiece(id)
                for id in self.checked_ids(ids)]

    def checked_ids(self, ids: Iterable[int]) -> list[int]:
        """A row of ids as plain ints; raises CodesError for what is none, or outside the vocabulary."""
        try:
            found = list(map(operator.index, ids))
        except TypeError as error:
            raise CodesError(f"Token ids are rows of whole numbers ({first_line(error)}).") from error
        outside = next((id for id in found if not 0 <= id < self.vocabulary.size), None)
        if outside is not None:
            raise CodesError(f"Token id {outside} is outside the vocabulary of {self.vocabulary.size} words.")
        return found


def plain_text(text: str, what: str = "The text") -> str:
    """The text itself.

    Raises:
        RequestError: it is none, or holds what is no character: a lone surrogate, or (from a file name, the command
            line or a pipe) a byte that is not UTF-8. The sentence begins with `what`.
    """
    if not isinstance(text, str):
        raise RequestError(f"{what} must be a text, not {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        found = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8," if 0xDC80 <= code <= 0xDCFF else (
            f"half a character (\\u{code:04x})")
        raise RequestError(f"{what} holds {found} at place {error.start + 1}; give plain Unicode text.") from None
    return text
