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
# into two words, punctuation marks dropped; brackets stay, as -lrb- and -rrb- (its list of marks has them in capitals).
_WORD = re.compile(r"\.\.\.|--|[+-]?\d+(?:[.,:/]\d+)*(?![^\W\d_])|[^\W\d_]+(?:\.[^\W\d_])+\.?|o['’]clock|"
                   r"[^\W_]+(?:[-_.@&][^\W_]+)*|\S")
_CONTRACTION = re.compile(r"(?<=[^\W\d_])(n['’]t|['’](?:s|re|ve|ll|d|m))\b")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"', "’", "‘", "“", "”"}


def caption_words(caption: str) -> list[str]:
    """The words of a caption that are compared."""
    words: list[str] = []
    for piece in _CONTRACTION.sub(r" \1 ", caption.lower()).split():
        cut = [piece.replace("’", "'")] if _CONTRACTION.fullmatch(f"x{piece}", 1) else _WORD.findall(piece)
        words += [_BRACKETS.get(word, word) for word in cut]
    return [word for word in words if word not in _DROPPED]


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
