"""Control words written out in texts (`</s>`, `<img>`, `<img_00012>`), of which most decoders make real tokens.

That is the released behaviour and no error: a page about HTML may strike out words with `<s>`, a caption may end in
`</s>`. But each of them ends a text or opens a picture, so the check warns of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from seed_multimodal.data.check.fields import RAW_TEXTS
from seed_multimodal.data.formats.record import Record
from seed_multimodal.language.tokenizer import MultimodalTokenizer

SHOWN = 3  # places that are named
KEYS = re.compile("|".join([*RAW_TEXTS, "texts", "data", "inputs", "response", "context", r"(caption|instruction)\d+"]))
RELEASED = re.compile(r"<img_[0-9]{5,}>|</?img>|</?s>|<unk>")
PICTURE = re.compile(r"</?img>|<img_[0-9]+>")
ORDINARY = "chat"  # there they are letters
WRITTEN_OUT = "sft.interleaved"  # there pictures are written by the names of their codes


@dataclass
class ControlWords:
    """Number of records with control words, count of each word (all names of codes as one), and the first places."""

    records: int = 0
    words: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def look(self, record: Record, decoder: str, tokenizer: MultimodalTokenizer | None) -> None:
        """Count those of one record of this decoder; without a tokenizer, the released one's are looked for."""
        if decoder == ORDINARY:
            return
        found: Counter[str] = Counter()
        place = ""
        for key, text in _texts(record.fields):
            words = RELEASED.findall(text) if tokenizer is None else tokenizer.control_words(text)
            words = [word for word in words if decoder != WRITTEN_OUT or not PICTURE.fullmatch(word)]
            found.update("<img_…>" if word.startswith("<img_") else word for word in words)
            place = place or (f"{record.where}: {words[0]} in {key!r}" if words else "")
        if not found:
            return
        self.records += 1
        self.words.update(found)
        if len(self.first) < SHOWN:
            self.first.append(place)

    def sentence(self) -> str:
        """The warning in words; "" without any."""
        if not self.records:
            return ""
        counts = ", ".join(f"{word} {number:,}" for word, number in self.words.most_common())
        who = "1 record holds" if self.records == 1 else f"{self.records:,} records hold"
        return (f"{who} control words in the text, which become real tokens in training: {counts} "
                f"({'first ' if self.records > SHOWN else ''}{'; '.join(self.first)}).")

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"records": self.records, "words": dict(self.words), "first": self.first}


def _texts(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, text) of every text that a decoder may read."""
    for key, value in fields.items():
        if KEYS.fullmatch(key):
            yield from ((key, text) for text in _strings(value))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one.get("text") if isinstance(one, dict) else one)
