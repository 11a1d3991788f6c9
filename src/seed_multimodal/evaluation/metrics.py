"""Numbers of the report card, each with its definition: retrieval, codebook use, answers, bootstrap intervals.

Everything here is plain numpy on finished outputs, so that every definition can be checked by hand (tests do).
Ties in retrieval count against the system, so a collapsed embedding (all pictures alike) scores zero
instead of winning by order.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seed_multimodal.errors import DataError

FloatArray = NDArray[np.floating]
OVERLAP = 0.5  # least intersection over union of a box that counts as found
RESAMPLES = 1000
LARGE = 100_000  # groups, above which the interval is the normal one
AT_ONCE = 1 << 22  # numbers of a group drawn at a time
PREFIXES = (1, 2, 4, 8, 16, 32)
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {word: str(i) for i, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve".split())}
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}“”‘’…]+")


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap interval (95 %) and the number of samples it rests on."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """The fields as JSON values, rounded; an empty estimate has `None` for its numbers."""
        return {k: (None if isinstance(v, float) and math.isnan(v) else round(v, 4)) for k, v in asdict(self).items()}


def bootstrap(values: Sequence[float] | NDArray[Any], groups: Sequence[Hashable] | NDArray[Any] | None = None
              ) -> Estimate:
    """Mean of `values` [N] and its percentile bootstrap interval; of more than `LARGE` groups the normal interval.

    Args:
        groups: one name per value; whole groups are resampled (several questions about one picture are not
            independent). The mean stays the mean over values.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    sums: FloatArray
    counts: FloatArray
    if groups is None:
        sums, counts = data, np.ones_like(data)
    else:
        order = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        index = np.fromiter((order[name] for name in groups), dtype=np.int64, count=data.size)
        sums, counts = np.bincount(index, weights=data).astype(float), np.bincount(index).astype(float)
    mean = float(data.mean())
    if sums.size > LARGE:
        half = 1.96 * math.sqrt(float(np.square(sums - mean * counts).sum())) / data.size
        return Estimate(mean, mean - half, mean + half, int(data.size))
    rng, means = np.random.default_rng(0), list[FloatArray]()
    for part in np.array_split(np.arange(RESAMPLES), -(-RESAMPLES * sums.size // AT_ONCE)):
        draws = rng.integers(0, sums.size, size=(len(part), sums.size))
        means.append(sums[draws].sum(1) / counts[draws].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(mean, float(low), float(high), int(data.size))


def retrieval_ranks(similarity: FloatArray, positives: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rank (0 is best) of the best positive of each query.

    Args:
        similarity: [Q, G] scores of Q queries against G gallery items.
        positives: [Q, G] true where the item is a right answer.
    Returns:
        [Q] how many wrong items score at least as high as the best right one. A score that is not a number counts
        against the query: as the lowest of a right item, as the highest of a wrong one.
    Raises:
        DataError: on shapes that differ, or a query without any right answer.
    """
    scores = np.asarray(similarity, dtype=np.float64)
    right = np.asarray(positives, dtype=bool)
    if scores.shape != right.shape or scores.ndim != 2:
        raise DataError(f"retrieval: similarity {scores.shape} and positives {right.shape} must be one [Q, G] shape.")
    if not right.any(1).all():
        raise DataError(f"retrieval: query {int(np.flatnonzero(~right.any(1))[0])} has no right answer in the gallery.")
    broken = np.isnan(scores)
    best = np.where(right & ~broken, scores, -np.inf).max(1, keepdims=True)
    return (((scores >= best) | broken) & ~right).sum(1)


def retrieval_at_k(similarity: FloatArray, positives: NDArray[np.bool_], k: int) -> FloatArray:
    """1.0 where a right item is among the best `k` of a query, else 0.0: [Q]. See `retrieval_ranks`."""
    return (retrieval_ranks(similarity, positives) < k).astype(np.float64)


def cosine(left: FloatArray, right: FloatArray) -> FloatArray:
    """Cosine of matching rows of two [N, D] arrays: [N]; a zero row gives 0."""
    a, b = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(1), norms, out=np.zeros(len(a)), where=norms > 0)


def entropy_nats(counts: Sequence[int] | NDArray[np.integer]) -> float:
    """Entropy in nats of the distribution proportional to `counts`."""
    p = np.asarray(counts, dtype=np.float64)
    p = p[p > 0] / p.sum()
    return float(max(0.0, -(p * np.log(p)).sum()))  # in this order: of -0.0, too, 0.0


def codebook_statistics(codes: NDArray[np.integer], codebook: int) -> dict[str, Any]:
    """Use of a codebook with `codebook` entries by `codes` [N, T], as rounded numbers for a report.

    Returns:
        sequences: N; codebook: its entries; used: those that occur at least once; usage: their share.
        perplexity: exp of the entropy (nats) of the distribution of all codes; at most the codebook's size.
        position_perplexity: mean over positions of the perplexity of the codes at that position.
        distinct: number of different sequences.
        prefix_bits: prefix length → entropy in bits of the first codes of a sequence; at most log2(N).

    Raises:
        DataError: on an empty array, or codes outside 0..codebook-1.
    """
    table = np.asarray(codes)
    if table.ndim != 2 or table.size == 0:
        raise DataError(f"codebook statistics need codes of shape [N, T], got {table.shape}.")
    if table.min() < 0 or table.max() >= codebook:
        raise DataError(f"codes {int(table.min())}..{int(table.max())} lie outside the codebook 0..{codebook - 1}.")
    counts = np.bincount(table.ravel(), minlength=codebook)
    by_position = [math.exp(entropy_nats(np.bincount(column))) for column in table.T]
    bits = {str(n): round(entropy_nats(_repeats(table[:, :n])) / math.log(2), 3)
            for n in PREFIXES if n <= table.shape[1]}
    return {"sequences": len(table), "codebook": codebook, "used": int((counts > 0).sum()),
            "usage": round(float((counts > 0).mean()), 4), "perplexity": round(math.exp(entropy_nats(counts)), 4),
            "position_perplexity": round(float(np.mean(by_position)), 4), "distinct": len(_repeats(table)),
            "prefix_bits": bits}


def _repeats(rows: NDArray[np.integer]) -> NDArray[np.int64]:
    """How often each different row occurs."""
    return np.unique(rows, axis=0, return_counts=True)[1]


def plain(value: Any) -> Any:
    """A report with `Estimate` objects as JSON values."""
    if isinstance(value, Estimate):
        return value.to_json()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


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
