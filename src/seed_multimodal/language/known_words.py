"""Vocabulary of a system's training data, in a file named by its `system.json`:

{"about": "150 things", "names": ["dog", "dogs", "fire truck", …], "words": ["a", "draw", …],
 "said": ["happy", "president", …]}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.phrases import ByValue, Phrases
from seed_multimodal.settings import nearest, read_settings

# A word in any alphabet (not the end of `2nd`), a number, or an emoji.
_WORD = re.compile(
    r"(?<!\w)[^\W\d]+(?:'[^\W\d]+)*|(?<![\w.])\d+(?!\w|\.\d)|[\u2600-\u27bf\U0001f000-\U0001faff]"
)
_POSSESSIVE_OR_NEGATION = re.compile(r"'s\b|(?<=[dest])n't\b")
MAX_NAMED = 12  # unknown words in a note: a pasted page would fill it
SPELT_LIKE = 0.75  # similarity from which a known thing is suggested


@dataclass(frozen=True)
class KnownWords:
    """A file of known words.

    names: of things. words: others that can be drawn, or do not change a drawing.
    said: further words that questions and answers use, and that no drawing shows.
    phrases: by which descriptions of drawings are compared with requests, see `Phrases`.
    """

    about: str
    names: tuple[str, ...]
    words: tuple[str, ...]
    said: tuple[str, ...] = ()
    phrases: Mapping[str, ByValue] = field(default_factory=dict)

    @cached_property
    def compared(self) -> Phrases:
        """The phrases, ready for comparisons."""
        return Phrases(self.phrases)

    @cached_property
    def colours(self) -> set[str]:
        """Colours of backgrounds."""
        backgrounds = self.phrases.get("background", {})
        return {name for name in backgrounds if f"{name} background" in backgrounds[name]}

    @cached_property
    def in_capitals(self) -> re.Pattern[str]:
        """Names and styles, also in capitals, and all other words in capitals: systems learned them
        in lower case."""
        words = _WORD.findall(" ".join([*self.names, *self.phrases.get("style", ())]))
        return re.compile(rf"\b(?:(?i:{'|'.join(map(re.escape, words))})|[A-Z]{{2,}})\b")

    def unknown(self, text: str, drawing: bool = False) -> list[str]:
        """Unknown words of a text, each once, in lower case: nouns first, in order.

        drawing: words that can only be said count as unknown, and colours of things.
        """
        # 1. The words of the text that are not in the vocabulary.
        text = text.lower().replace("\u2019", "'").replace("_", " ")
        text = _POSSESSIVE_OR_NEGATION.sub("", text)
        names = set(_WORD.findall(" ".join(self.names).lower()))
        vocabulary = {*self.words, *names}
        if not drawing:
            vocabulary.update(self.said)
        words = _WORD.findall(text)
        unknown: list[str] = []
        for word in dict.fromkeys(words):
            is_letter = len(word) == 1 and word.isascii() and not word.isdigit()
            if word not in vocabulary and not is_letter:
                unknown.append(word)

        # 2. Colours are those of a background.
        if drawing and "background" not in words:
            for word in _WORD.findall(self.compared.pattern.sub(" ", text)):
                if word in self.colours and word not in unknown:
                    unknown.append(word)

        # 3. A word in front of a name or of another unknown word says something about it.
        nouns = {*names, *unknown}
        modifiers = set()
        for word, next_word in zip(words, words[1:], strict=False):
            if next_word in nouns:
                modifiers.add(word)
        return sorted(unknown, key=lambda word: word in modifiers)

    def note(self, text: str, drawing: bool = False) -> str:
        """One sentence about unknown words, or nothing; `drawing`: as of `unknown`."""
        named = []
        for word in self.unknown(text, drawing)[:MAX_NAMED]:
            if word in self.colours:
                named.append(f"{word!r} of things")
            else:
                named.append(f"{word[:40]!r}{nearest(word, self.names, SPELT_LIKE)}")
        if not named:
            return ""
        return (
            f"This system does not know {', '.join(named)}: it learned {self.about}, which "
            "known_words.json lists."
        )


@lru_cache(maxsize=8)
def read_known_words(file: Path) -> KnownWords:
    """A file of known words; raises `ConfigError` if it is missing or holds something else."""
    return read_settings(KnownWords, read_json_object(file, ConfigError), str(file))
