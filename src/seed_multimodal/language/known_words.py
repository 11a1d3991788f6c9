"""Vocabulary of a system's training data, in a file named by its `system.json`:

    {"about": "150 things", "names": ["dog", "dogs", "fire truck", …], "words": ["a", "draw", …],
     "examples": {"animal": ["cat", "dog", "horse"], …}}
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import read_settings

# A word in any alphabet (not the end of `2nd`), a number, or an emoji.
_WORD = re.compile(r"(?<!\w)[^\W\d]+(?:'[^\W\d]+)*|(?<![\w.])\d+(?!\w|\.\d)|[\u2600-\u27bf\U0001f000-\U0001faff]")


@dataclass(frozen=True)
class KnownWords:
    """Known words; `examples`: known names for general terms."""

    about: str
    names: tuple[str, ...]
    words: tuple[str, ...]
    examples: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def unknown(self, text: str) -> list[str]:
        """Distinct unknown words of a text in order, in lower case; a part of a name (`fire`) is unknown, too."""
        plain = re.sub(r"'s\b|(?<=[dest])n't\b", "", text.lower().replace("\u2019", "'").replace("_", " "))
        longest = "|".join(sorted(map(re.escape, self.names), key=len, reverse=True))
        words = dict.fromkeys(_WORD.findall(re.sub(rf"(?<!\w)(?:{longest})(?!\w)", " ", plain)))
        return [word for word in words if word not in self.words
                and (len(word) > 1 or not word.isascii() or word.isdigit())]

    def note(self, text: str) -> str:
        """Message about unknown words, with names for the first general term; or empty."""
        unknown = [word[:40] for word in self.unknown(text)]
        examples = next((self.examples[one] for word in unknown for one in (word, word.removesuffix("s"))
                         if one in self.examples), ())
        some = f", such as {', '.join(examples)}" if examples else ""
        words = ", ".join(map(repr, unknown[:3]))
        return f"This system does not know {words}: it learned {self.about}{some}." if unknown else ""


@lru_cache(maxsize=8)
def read_known_words(file: Path) -> KnownWords:
    """Read a file of known words. Raises ConfigError: missing or invalid."""
    return read_settings(KnownWords, read_json_object(file, ConfigError), str(file))
