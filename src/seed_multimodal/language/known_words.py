"""Vocabulary of a system's training data, in a file named by its `system.json`:

{"about": "150 things", "names": ["dog", "dogs", "fire truck", …], "words": ["a", "draw", …]}
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import read_settings

# A word in any alphabet (not the end of `2nd`), a number, or an emoji.
_WORD = re.compile(
    r"(?<!\w)[^\W\d]+(?:'[^\W\d]+)*|(?<![\w.])\d+(?!\w|\.\d)|[\u2600-\u27bf\U0001f000-\U0001faff]"
)
_POSSESSIVE_OR_NEGATION = re.compile(r"'s\b|(?<=[dest])n't\b")
MAX_NAMED = 3  # unknown words in a note


@dataclass(frozen=True)
class KnownWords:
    """A file of known words."""

    about: str
    names: tuple[str, ...]
    words: tuple[str, ...]

    def unknown(self, text: str) -> list[str]:
        """Unknown words of a text in order, each once, in lower case."""
        text = text.lower().replace("\u2019", "'").replace("_", " ")
        text = _POSSESSIVE_OR_NEGATION.sub("", text)
        vocabulary = {*self.words, *_WORD.findall(" ".join(self.names).lower())}
        unknown: list[str] = []
        for word in dict.fromkeys(_WORD.findall(text)):
            is_letter = len(word) == 1 and word.isascii() and not word.isdigit()
            if word not in vocabulary and not is_letter:
                unknown.append(word)
        return unknown

    def note(self, text: str) -> str:
        """One sentence about unknown words, or nothing."""
        unknown = self.unknown(text)[:MAX_NAMED]
        if not unknown:
            return ""
        listed = ", ".join(repr(word[:40]) for word in unknown)
        return f"This system does not know {listed}: it learned {self.about}."


@lru_cache(maxsize=8)
def read_known_words(file: Path) -> KnownWords:
    """A file of known words; raises `ConfigError` if it is missing or holds something else."""
    return read_settings(KnownWords, read_json_object(file, ConfigError), str(file))
