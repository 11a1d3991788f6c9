"""Scores of captions against reference captions: BLEU-1…4, ROUGE-L and CIDEr(-D), as COCO's caption evaluation defines
them; METEOR and SPICE, which need Java, are not among them.

    caption_scores({9: "a red fox"}, {9: ["a fox on a hill", "the red fox"]})
    # {"Bleu_1": …, "Bleu_2": …, "Bleu_3": …, "Bleu_4": …, "ROUGE_L": …, "CIDEr": …}

Sources: Papineni et al. 2002 (BLEU), Lin 2004 (ROUGE-L), Vedantam et al. 2015 (CIDEr-D, sigma 6, times 10). Document
frequencies of CIDEr are those of the references given, so its value belongs to the set that was scored.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from seed_multimodal.errors import DataError

ORDERS = 4
SIGMA = 6.0  # of CIDEr-D's penalty on another length, in words
BETA = 1.2  # how much recall weighs in ROUGE-L
Grams = Counter[tuple[str, ...]]
Key = TypeVar("Key", bound=Hashable)

# A stand-in for the Penn Treebank tokeniser (a Java program) that COCO's evaluation uses: lower case, contractions cut
# into two words, punctuation marks dropped; brackets stay, as -lrb- and -rrb- (its list of marks has them in capitals),
# and so do the full stop of an abbreviation and several marks together (!!).
_ABBREVIATIONS = ("mr|mrs|ms|dr|prof|gen|sen|rep|gov|capt|lt|sgt|col|jr|sr|st|mt|ft|ave|blvd|rd|dept|est|tel|bros|inc|"
                  "co|ltd|corp|vs|etc|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tue|wed|thu|fri|calif|fla|ariz")
_WORD = re.compile(rf"""
    (?<!\w)n't\b | 'n' | (?<!\w)'\d\ds?(?!\w) | '(?:s|re|ve|ll|d|m|t|em|til|cause|n)(?!\w)
    | (?:https?://|www\.)[^\s"'<>()]*[\w/]
    | \.\.\.+ | --+ | [?!]{{2,}} | \*+ | \#{{2,}} | << | >> | (?<!\S)[:;]-?[()]
    | [^\W\d_]+(?:\.[^\W\d_])+(?![^\W_])\.?                             # u.s., p.m., ph.d.
    | (?:{_ABBREVIATIONS}|[a-z])\.(?!\w) | no\.(?=\s*\d)
    | (?:(?:[odlsn]|qu)'|c'(?=mon)|ma'(?=am))[^\W\d_]{{2,}} | [yj]'(?=\w) | ol'
    | [+-]?(?:\d+(?:[.,:]\d+)+|\.\d+)(?:-[^\W\d_][^\W_]*)*                # 1,000, 10:30, 3.5-inch
    | [+-]\d++(?![^\W\d_])
    | (?-i:[A-Z]+(?:&[A-Z]+)+) | @[^\W_]+ | \#[^\W\d_][^\W_]*
    | [^\W_]+(?:[-_.@/][^\W_]+)*                                          # and/or, 21st, 3-way, 737-800
    | \S""", re.VERBOSE | re.IGNORECASE)
_CUT = re.compile(r"(?<=[^\W_])(n't|'(?:s|re|ve|ll|d|m))\b", re.IGNORECASE)
_CUT_BEHIND = re.compile(r"(?<!\w)('t(?=(?:is|was)\b)|can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|"
                         r"(?:gim|lem)(?=me\b))", re.IGNORECASE)
_SAME = str.maketrans({
    "’": "'", "‘": "'", "…": "...", "–": "--", "—": "--", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ",
    "⅔": " 2/3 ", "£": "#", "€": "$", "¢": " cents ", "\ufffd": " "})
_UNKNOWN = re.compile("[\U00010000-\U0010ffff]")  # emoji among them
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
_DROPPED = {"'", "`", ".", "?", "!", ",", ":", "-", ";", '"', "“", "”"}


def caption_words(caption: str) -> list[str]:
    """The words of a caption that are compared."""
    text = _CUT.sub(r" \1 ", _UNKNOWN.sub(" ", caption.translate(_SAME)))
    words = (word.lower().translate(_BRACKETS) for word in _WORD.findall(_CUT_BEHIND.sub(r"\1 ", text)))
    return [word for word in words if word not in _DROPPED and not word.startswith(("...", "--"))]


def caption_scores(captions: Mapping[Key, str], references: Mapping[Key, Sequence[str]]) -> dict[str, float]:
    """Corpus scores of one caption a picture.

    Raises:
        DataError: no caption, or a picture without references.
    """
    if not captions:
        raise DataError("There is no caption to score.")
    bare = next((key for key in captions if not references.get(key)), None)
    if bare is not None:
        raise DataError(f"Picture {bare} has no reference caption.")
    made = [caption_words(caption) for caption in captions.values()]
    wanted = [[caption_words(one) for one in references[key]] for key in captions]
    return {**bleu(made, wanted), "ROUGE_L": rouge_l(made, wanted), "CIDEr": cider(made, wanted)}


def bleu(made: Sequence[Sequence[str]], wanted: Sequence[Sequence[Sequence[str]]]) -> dict[str, float]:
    """BLEU of orders 1 to 4 of a corpus; the brevity penalty takes the reference nearest in length (the shorter of
    two)."""
    right, tried, length, effective = [0] * ORDERS, [0] * ORDERS, 0, 0
    for words, references in zip(made, wanted, strict=True):
        length += len(words)
        effective += min((abs(len(one) - len(words)), len(one)) for one in references)[1]
        for order in range(1, ORDERS + 1):
            own, most = _grams(words, order), Grams()
            for one in references:
                most |= _grams(one, order)
            right[order - 1] += (own & most).total()
            tried[order - 1] += max(0, len(words) - order + 1)
    penalty = min(1.0, math.exp(1 - effective / length)) if length else 0.0
    scores, product = {}, 1.0
    for order in range(1, ORDERS + 1):
        product *= right[order - 1] / tried[order - 1] if tried[order - 1] else 0.0
        scores[f"Bleu_{order}"] = penalty * product ** (1 / order)
    return scores


def rouge_l(made: Sequence[Sequence[str]], wanted: Sequence[Sequence[Sequence[str]]]) -> float:
    """Mean of the F-measure of the longest common subsequence: best precision and best recall of any reference."""
    total = 0.0
    for words, references in zip(made, wanted, strict=True):
        common = [_longest_common(words, one) for one in references]
        precision = max(common) / len(words) if words else 0.0
        recall = max(n / len(one) if one else 0.0 for n, one in zip(common, references, strict=True))
        if precision and recall:
            total += (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
    return total / len(made)


def cider(made: Sequence[Sequence[str]], wanted: Sequence[Sequence[Sequence[str]]]) -> float:
    """CIDEr-D: 10 times the mean, over orders 1 to 4 and references, of the cosine of clipped tf-idf vectors times a
    Gaussian of the difference in length."""
    pictures = len(wanted)
    seen = Grams()  # in how many pictures' references each n-gram stands
    for references in wanted:
        seen.update({gram for one in references for order in range(1, ORDERS + 1) for gram in _grams(one, order)})
    scale = math.log(pictures)

    def vector(words: Sequence[str], order: int) -> tuple[dict[tuple[str, ...], float], float]:
        weights = {gram: count * (scale - math.log(max(1, seen[gram]))) for gram, count in _grams(words, order).items()}
        return weights, math.sqrt(sum(weight**2 for weight in weights.values()))

    total = 0.0
    for words, references in zip(made, wanted, strict=True):
        score = 0.0
        for order in range(1, ORDERS + 1):
            own, own_norm = vector(words, order)
            for one in references:
                other, norm = vector(one, order)
                if own_norm and norm:
                    product = sum(min(weight, other[gram]) * other[gram] for gram, weight in own.items()
                                  if gram in other)
                    # As the original computes it, the lengths are counts of bigrams.
                    apart = max(len(words) - 1, 0) - max(len(one) - 1, 0)
                    score += product / (own_norm * norm) * math.exp(-(apart**2) / (2 * SIGMA**2))
        total += 10 * score / (ORDERS * len(references))
    return total / len(made)


def _grams(words: Sequence[str], order: int) -> Grams:
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))


def _longest_common(left: Sequence[str], right: Sequence[str]) -> int:
    row = [0] * (len(right) + 1)
    for word in left:
        before = 0
        for place, other in enumerate(right, 1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]
