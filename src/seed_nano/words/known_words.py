"""Vocabulary of a system's training data, in a file named by its `system.json`:

{"about": "150 things", "names": ["dog", "dogs", "fire truck", …], "words": ["a", "draw", …],
 "said": ["happy", "president", …], "readings": {"plane": "airplane", …},
 "spellings": {"plz": "please", …}, "nearest": {"sandwich": ["burger", …], …},
 "other": ["mouse", …]}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from pathlib import Path

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import read_settings
from seed_nano.words.phrases import ByValue, Phrases, any_of
from seed_nano.words.spelling import corrected

# Anybody's texts: each repetition begins at a boundary, keeps what it matched (`+` behind it), and
# ends at the next beginning, so that the time grows with the length, not with its square.
# A word in any alphabet (not the end of `2nd`), a number, or an emoji.
_WORD = re.compile(
    r"(?<!\w)[^\W\d]++(?:'[^\W\d]++)*+|(?<![\w.])\d++(?!\w|\.\d)"
    r"|[\u2600-\u27bf\U0001f000-\U0001faff]"
)
# What is read as it stands: quotations, image tokens, names of files and addresses.
_LITERAL = re.compile(
    r"(\"[^\"]*+\"|“[^“”]*+”|(?<!\w)'[^']*+'(?!\w)|<[^<>]*+>"
    r"|(?:(?<!\S)[^\s/\\@]++)?+[/\\@]\S*+|(?<!\w)\w++(?:\.\w++)++)",
    re.ASCII,
)
# A name that the user tells, which is no misspelt word.
_INTRODUCED = re.compile(r"\b(?:my name is|call me|i am|i'm|im)\s++(\w++)", re.IGNORECASE)
_ARTICLE = r"(?i:\ban?(?= (?:([aeio]|u[^fn])|\w)))"
_POSSESSIVE_OR_NEGATION = re.compile(r"'s\b|(?<=[dest])n't\b")
MAX_NAMED = 12  # unknown words in a note: a pasted page would fill it
MAX_CORRECTED = 20  # words of a request that may be misspelt
N_NEAREST = 3  # known things in a note
LONGEST = 40  # letters of a word in it


class Reading(str):
    """A text as a system reads it, which is not read again.

    changed: what was written and how it is read, as far as a user should know it.
    """

    changed: Mapping[str, str]


@dataclass(frozen=True)
class KnownWords:
    """A file of known words.

    names: of things. words: others that can be drawn, or do not change a drawing.
    said: further words that questions and answers use, and that no drawing shows.
    phrases: by which descriptions of drawings are compared with requests, see `Phrases`.
    readings: words or phrases that are read as known ones, which the user is told.
    spellings: those of chats, which he is not told.
    nearest: known things that are most like an unknown one; of others those that are spelt like it.
    other: words that are spelt like known ones, and mean something else.
    """

    about: str
    names: tuple[str, ...]
    words: tuple[str, ...]
    said: tuple[str, ...] = ()
    phrases: Mapping[str, ByValue] = field(default_factory=dict)
    readings: dict[str, str] = field(default_factory=dict)
    spellings: dict[str, str] = field(default_factory=dict)
    nearest: dict[str, tuple[str, ...]] = field(default_factory=dict)
    other: tuple[str, ...] = ()

    @cached_property
    def compared(self) -> Phrases:
        """The phrases, ready for comparisons."""
        return Phrases(self.phrases)

    @property
    def listed(self) -> dict[str, list[str]]:
        """What users may name: things, and the first phrase of each value of a table."""
        first_phrases = {
            table: [phrases[0] for phrases in values.values()]
            for table, values in self.phrases.items()
        }
        return {"things": [*self.names]} | first_phrases

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
        return re.compile(rf"\b(?:(?i:{any_of(words)})|[A-Z]{{2,}}+)\b")

    # ---- reading

    def read(self, text: str, tried: set[str] | None = None) -> Reading:
        """A user's text in the words that the system learned.

        tried: words of the request that may be misspelt, to which those of the text are added.
        """
        changed: dict[str, str] = {}
        if tried is None:
            tried = set()
        introduced = {match[1].lower() for match in _INTRODUCED.finditer(text)}

        def right(word: re.Match[str]) -> str:
            written = word[0].lower()
            is_name = word.start() > 0 and word[0][0].isupper()  # inside of a sentence
            is_known = written in self._spelt or written in introduced
            if is_name or is_known or not written.isalpha():
                return word[0]
            if written not in tried and len(tried) == MAX_CORRECTED:
                return word[0]
            tried.add(written)
            read = self._corrected(written)
            if read == written:
                return word[0]
            changed[word[0]] = read
            return read

        parts = _LITERAL.split(text)
        for index in range(0, len(parts), 2):  # the others are literals
            part = parts[index]

            # 1. Names, styles and words in capitals, which systems learned in lower case, and
            #    misspelt words.
            part = self.in_capitals.sub(lambda word: word[0].lower(), part)
            part = _WORD.sub(right, part)

            # 2. Other words for known ones.
            parts[index] = self._written_otherwise.sub(partial(self._replaced, changed), part)

        # 3. The articles before what was changed.
        if changed:
            article = re.compile(rf"{_ARTICLE}(?= {any_of(changed.values())}\b)")
            parts[::2] = [article.sub(_right_article, part) for part in parts[::2]]
        reading = Reading("".join(parts))
        reading.changed = changed
        return reading

    def _replaced(self, changed: dict[str, str], match: re.Match[str]) -> str:
        """How a word or phrase is read; adds to `changed` what the user should know."""
        written = " ".join(match[0].lower().replace("\u2019", "'").split())
        read = self._otherwise[written]
        if written in self.readings:
            changed[match[0]] = read
        if read == written:
            return match[0]
        return read.capitalize() if match[0][0].isupper() and match.start() == 0 else read

    @cached_property
    def _corrected(self) -> Callable[[str], str]:
        """`corrected` to known words, kept, since each turn of a conversation is read again."""
        return lru_cache(maxsize=1 << 12)(partial(corrected, known=self._spelt))

    @cached_property
    def _spelt(self) -> Mapping[str, str]:
        """Each word with what it is a form of; those with nothing are not to be corrected to."""
        forms = dict.fromkeys(self.other, "")
        for text in (*self.words, *self.said, *self.names):
            forms |= {word: word for word in _WORD.findall(text.lower())}
        for name, phrases in self.phrases.get("things", {}).items():
            forms |= {phrase: name for phrase in phrases if phrase in forms}
        read_otherwise = self.spellings | self.readings
        for written, read in read_otherwise.items():
            if written.isalpha() and written not in forms:
                forms[written] = forms.get(read, read)
        # Words of a phrase mean something else alone.
        words = _WORD.findall(" ".join(read_otherwise))
        return dict.fromkeys(words, "") | forms

    @cached_property
    def _otherwise(self) -> Mapping[str, str]:
        """How words and phrases are read; names of several words stay."""
        return {**{name: name for name in self.names}, **self.spellings, **self.readings}

    @cached_property
    def _written_otherwise(self) -> re.Pattern[str]:
        """All of them."""
        pattern = any_of(self._otherwise).replace("'", "['\u2019]").replace(r"\ ", r"\s++")
        return re.compile(rf"(?<![\w'+*/.-]){pattern}(?![\w'+*/-]|\.\w)", re.IGNORECASE)

    # ---- unknown words

    def unknown(self, text: str, drawing: bool = False) -> list[str]:
        """Unknown words of a text, each once, in lower case: nouns first, in order.

        drawing: words that can only be said count as unknown, and colours of things.
        """
        # 1. The words of the text that are not in the vocabulary.
        text = _INTRODUCED.sub("", text).lower().replace("\u2019", "'").replace("_", " ")
        text = _POSSESSIVE_OR_NEGATION.sub("", text)
        names = set(_WORD.findall(" ".join(self.names).lower()))
        vocabulary = {*self.words, *names}
        if not drawing:
            vocabulary.update(self.said)
        words = _WORD.findall(text)
        unknown: dict[str, None] = {}
        for word in words:
            is_letter = len(word) == 1 and word.isascii() and not word.isdigit()
            if word not in vocabulary and not is_letter:
                unknown[word] = None

        # 2. Colours are those of a background.
        if drawing and "background" not in words:
            for word in _WORD.findall(self.compared.pattern.sub(" ", text)):
                if word in self.colours:
                    unknown[word] = None

        # 3. A word in front of a name or of another unknown word says something about it.
        nouns = {*names, *unknown}
        modifiers = {word for word, next_word in pairwise(words) if next_word in nouns}
        return sorted(unknown, key=lambda word: word in modifiers)

    def notes(self, text: str, changed: Mapping[str, str], drawing: bool = False) -> list[str]:
        """A note of words that are read otherwise, and one of unknown words of a text that was
        read, as far as there are such; drawing: as of `unknown`."""
        notes: list[str] = []
        if changed:
            pairs = [f"{written!r} as {read!r}" for written, read in changed.items()]
            notes.append(f"Read {', '.join(pairs)}.")
        unknown = self.unknown(text, drawing)[:MAX_NAMED]
        if not unknown:
            return notes
        named = []
        for word in unknown:
            named.append(f"{word!r} of things" if word in self.colours else f"{word[:LONGEST]!r}")
        note = f"This system does not know {', '.join(named)}: it learned {self.about}"
        if unknown[0] not in self.colours:
            nearest = self.nearest.get(unknown[0]) or get_close_matches(
                unknown[0][:LONGEST], self.listed["things"], N_NEAREST, cutoff=0
            )
            note += f", such as {', '.join(nearest)}"
        return [*notes, f"{note}."]


def _right_article(article: re.Match[str]) -> str:
    """`a` or `an` before a word."""
    right = "an" if article[1] else "a"
    return right.capitalize() if article[0][0].isupper() else right


@lru_cache(maxsize=8)
def read_known_words(file: Path) -> KnownWords:
    """A file of known words; raises `ConfigError` if it is missing or holds something else."""
    return read_settings(KnownWords, read_json_object(file, ConfigError), str(file))
