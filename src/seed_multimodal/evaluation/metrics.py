"""Means with bootstrap intervals, and codebook usage."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
RESAMPLES = 1000
LARGE = 100_000  # above this number of groups the normal interval is used
AT_ONCE = 1 << 22  # indices drawn at a time
PREFIXES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap interval (95 %) and the number of samples."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """The fields, rounded; None values for an empty estimate."""
        return {
            k: (None if isinstance(v, float) and math.isnan(v) else round(v, 4))
            for k, v in asdict(self).items()
        }


def bootstrap(
    values: Sequence[float] | NDArray[Any], groups: Sequence[Hashable] | NDArray[Any] | None = None
) -> Estimate:
    """Mean of `values` [N] and its percentile bootstrap interval; of more than `LARGE` groups the normal interval.

    Args:
        groups: one name per value; whole groups are resampled (several questions about one image are not
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
        sums, counts = (
            np.bincount(index, weights=data).astype(float),
            np.bincount(index).astype(float),
        )
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


def entropy_nats(counts: Sequence[int] | NDArray[np.integer]) -> float:
    """Entropy in nats of the distribution proportional to `counts`."""
    p = np.asarray(counts, dtype=np.float64)
    p = p[p > 0] / p.sum()
    return float(max(0.0, -(p * np.log(p)).sum()))  # max maps -0.0 to 0.0


def codebook_statistics(codes: NDArray[np.integer], codebook: int) -> dict[str, Any]:
    """Use of a codebook with `codebook` entries by `codes` [N, T], as rounded numbers for a report.

    Returns:
        sequences: N; codebook: its entries; used: those that occur at least once; usage: their share.
        perplexity: exp of the entropy (nats) of the distribution of all codes; at most the codebook's size.
        position_perplexity: mean over positions of the perplexity of the codes at that position.
        distinct: number of different sequences.
        prefix_bits: prefix length → entropy in bits of the first codes of a sequence; at most log2(N).
    """
    table = np.asarray(codes)
    counts = np.bincount(table.ravel(), minlength=codebook)
    by_position = [math.exp(entropy_nats(np.bincount(column))) for column in table.T]
    bits = {
        str(n): round(entropy_nats(_repeats(table[:, :n])) / math.log(2), 3)
        for n in PREFIXES
        if n <= table.shape[1]
    }
    return {
        "sequences": len(table),
        "codebook": codebook,
        "used": int((counts > 0).sum()),
        "usage": round(float((counts > 0).mean()), 4),
        "perplexity": round(math.exp(entropy_nats(counts)), 4),
        "position_perplexity": round(float(np.mean(by_position)), 4),
        "distinct": len(_repeats(table)),
        "prefix_bits": bits,
    }


def _repeats(rows: NDArray[np.integer]) -> NDArray[np.int64]:
    """Counts of distinct rows."""
    return np.unique(rows, axis=0, return_counts=True)[1]


def plain(value: Any) -> Any:
    """A report with `Estimate` objects as JSON values."""
    if isinstance(value, Estimate):
        return value.to_json()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
