"""Misspelt words: the one known word that is nearest to what was written.

    corrected("elefant", {"elephant": "elephant", "elegant": ""})    # "elephant"

Letters that are missing, added, other, or exchanged with the next one count one each (Damerau 1964;
no letter is edited twice).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

SHORTEST = 3  # letters of a word that may be misspelt
TWO_FAULTS = 6  # letters from which two faults are allowed
LONGEST = 24


def corrected(word: str, known: Mapping[str, str]) -> str:
    """The nearest known word to one that is not known, or the word itself: no one or several are
    near.

    known: words, each with what it is a form of (of "dogs" "dog"): the shortest of several forms of
        the same is taken. Words that are forms of nothing stay, and are not taken.
    """
    if not SHORTEST <= len(word) <= LONGEST:
        return word

    # 1. All words that are near; exchanged letters are the likeliest fault.
    limit = 2 if len(word) >= TWO_FAULTS else 1
    nearest: list[str] = []
    least = (limit + 1, 0)
    folded = fold(word)
    own = letters(word)
    for candidate in known:
        other = letters(candidate)
        if (own & ~other).bit_count() > limit or (other & ~own).bit_count() > limit:
            continue  # a fault takes a letter, adds one, or both
        is_exchanged = sorted(candidate) == sorted(word)
        if len(word) == SHORTEST and not is_exchanged and len(candidate) <= len(word):
            continue  # other or fewer letters of so few make another word
        faults = n_faults(word, candidate, limit)
        if faults <= limit and fold(candidate) == folded:
            faults = 0
        distance = (faults, 0 if is_exchanged else 1)
        if faults > limit or distance > least:
            continue
        if distance < least:
            nearest = []
            least = distance
        nearest.append(candidate)

    # 2. One of them, or forms of one.
    taken = [candidate for candidate in nearest if known[candidate]]
    if len({known[candidate] for candidate in taken}) != 1:
        return word
    return min(taken, key=len)


@lru_cache(maxsize=1 << 15)
def letters(word: str) -> int:
    """The letters of a word, a bit for each time; those of other alphabets share them."""
    bits = {ord(letter) % 32 + 32 * word.count(letter, 0, i) for i, letter in enumerate(word)}
    return sum(1 << bit for bit in bits)


def fold(word: str) -> str:
    """A word as it sounds: with single letters, `f` for `ph`."""
    return re.sub(r"(.)\1+", r"\1", word.replace("ph", "f"))


def n_faults(written: str, word: str, limit: int) -> int:
    """Edits of letters from one word to another; of more than the limit not all are counted."""
    before: list[int] = []
    last = list(range(len(word) + 1))
    for i, letter in enumerate(written, 1):
        row = [i]
        for j, other in enumerate(word, 1):
            faults = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            is_exchanged = i > 1 and j > 1 and written[i - 2] == other and letter == word[j - 2]
            if is_exchanged:
                faults = min(faults, before[j - 2] + 1)
            row.append(faults)
        before = last
        last = row
        if min(row) > limit:
            break
    return last[-1]
