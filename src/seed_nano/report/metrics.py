"""Scores of answers and boxes."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from seed_multimodal.evaluation.metrics import FloatArray

OVERLAP = 0.5  # least intersection over union of a box that counts as found
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {word: str(i) for i, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve".split())}
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}“”‘’…]+")


def normalise_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, number words as digits, single spaces (after the VQA evaluation)."""
    words = _PUNCTUATION.sub(" ", text.lower()).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def same_answer(answer: str, truth: str) -> bool:
    """Whether two short answers are equal after `normalise_answer`."""
    return normalise_answer(answer) == normalise_answer(truth)


def majority_baseline(train: Sequence[tuple[Hashable, str]], test: Sequence[tuple[Hashable, str]]) -> FloatArray:
    """Baseline without pictures: the most frequent training answer of each kind, [len(test)].

    Args:
        train, test: (kind, answer) pairs; a kind without training answers scores 0.
    """
    tally: dict[Hashable, Counter[str]] = {}
    for kind, answer in train:
        tally.setdefault(kind, Counter())[normalise_answer(answer)] += 1
    guess = {kind: counter.most_common(1)[0][0] for kind, counter in tally.items()}
    return np.array([float(kind in guess and same_answer(guess[kind], answer)) for kind, answer in test])


def matched(found: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> int:
    """How many boxes are found: each of `wanted` by the best of `found` that is left, with enough overlap."""
    left, hits = list(range(len(found))), 0
    for box in wanted:
        best = max(left, key=lambda place: overlap(found[place], box), default=None)
        if best is not None and overlap(found[best], box) >= OVERLAP:
            left.remove(best)
            hits += 1
    return hits


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return both / (areas - both) if areas > both else 0.0
