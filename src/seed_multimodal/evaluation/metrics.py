"""Means with bootstrap intervals, and codebook usage."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import DataError

FloatArray: TypeAlias = NDArray[np.floating]
Value = TypeVar("Value")
Group = TypeVar("Group", bound=Hashable)
RESAMPLES = 1000
# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom, and of the normal distribution.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
NORMAL_QUANTILE = 1.959964
PREFIXES = (1, 2, 4, 8, 16, 32)


def finite(values: ArrayLike, label: str) -> None:
    """Raise DataError for numbers that are not finite, which compare as nothing does."""
    if not np.isfinite(np.asarray(values, dtype=np.float64).sum()):
        raise DataError(
            f"{label}: numbers are not finite; the weights are damaged, or need a wider --dtype."
        )


def finite_json(value: object, label: str, indent: int | None = None) -> str:
    """Scores as JSON. Raises DataError as `finite`."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    except ValueError:
        finite(math.nan, label)
        raise


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval (95 %) and the number of samples."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """The fields, rounded; None values for an empty estimate."""
        if not self.n:
            return {"value": None, "low": None, "high": None, "n": 0}
        return {name: round(value, 4) for name, value in asdict(self).items()}


def bootstrap(values: ArrayLike, groups: Iterable[Hashable] | None = None) -> Estimate:
    """Mean of `values` [N] and its percentile bootstrap interval.

    Args:
        groups: a name for each value; whole groups are resampled (questions about the same image
            are not independent). The mean stays the mean over values.

    Raises DataError: not finite.
    """
    data = np.asarray(values, dtype=np.float64)
    finite(data, "scores")
    if data.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)

    # 1. Sum and number of the values of each group.
    rows = grouped(data.tolist(), range(data.size) if groups is None else groups).values()
    sums = np.array([sum(row) for row in rows])
    counts = np.array([len(row) for row in rows])

    # 2. Means of resampled groups.
    rng = np.random.default_rng(0)
    means: list[float] = []
    for _ in range(RESAMPLES):
        sampled = rng.integers(0, sums.size, size=sums.size)
        means.append(sums[sampled].sum() / counts[sampled].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(data.mean()), float(low), float(high), int(data.size))


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean of a few independent runs and its interval by Student's t; one value: no width."""
    n_runs = len(values)
    mean = sum(values) / n_runs
    half = 0.0
    if n_runs > 1:
        half = t_quantile(n_runs - 1) * statistics.stdev(values) / math.sqrt(n_runs)
    return Estimate(mean, mean - half, mean + half, n_runs)


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; from 10 degrees of freedom on to 4 digits (Abramowitz and
    Stegun, 26.7.5)."""
    if freedom <= len(T_QUANTILES):
        return T_QUANTILES[freedom - 1]
    z = NORMAL_QUANTILE
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def grouped(values: Iterable[Value], groups: Iterable[Group]) -> dict[Group, list[Value]]:
    """The values of each group, in their order."""
    by_group: dict[Group, list[Value]] = {}
    for value, group in zip(values, groups, strict=True):
        by_group.setdefault(group, []).append(value)
    return by_group


def group_means(values: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """The mean of the values of each group, rounded; those of the group "" are left out."""
    rows = sorted(grouped(values, groups).items())
    return {name: round(sum(row) / len(row), 2) for name, row in rows if name}


def mean_of_means(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent means; the ends of its interval add up as variances do."""
    n_groups = len(estimates)
    value = sum(estimate.value for estimate in estimates) / n_groups
    below = math.hypot(*(estimate.value - estimate.low for estimate in estimates)) / n_groups
    above = math.hypot(*(estimate.high - estimate.value for estimate in estimates)) / n_groups
    n_values = sum(estimate.n for estimate in estimates)
    return Estimate(value, value - below, value + above, n_values)


def psnr(error: float) -> float:
    """PSNR in dB of a mean squared error of 8-bit values; 58 at most, where images are equal."""
    return 10 * math.log10(255**2 / max(float(error), 0.1))


def entropy_nats(counts: Sequence[int] | NDArray[np.integer]) -> float:
    """Entropy in nats of the distribution proportional to `counts`."""
    weights = np.asarray(counts, dtype=np.float64)
    p = weights[weights > 0] / weights.sum()
    return float(max(0.0, -(p * np.log(p)).sum()))  # max maps -0.0 to 0.0


def codebook_statistics(codes: ArrayLike, codebook: int) -> JsonObject:
    """Use of a codebook with `codebook` entries by `codes` [N, T], as rounded numbers for a report.

    Rows of sequences with fewer codes are padded with -1.

    Returns:
        sequences: N. codebook: its entries.
        used: entries that occur at least once. usage: their share.
        perplexity: exp of the entropy (nats) of the distribution of all codes; at most the
            codebook's size.
        position_perplexity: mean over positions of the perplexity of the codes at that position.
        image_bits: codes of an image times log2 of the number of codes that occur at a position.
        distinct: number of different sequences.
        prefix_bits: prefix length → entropy in bits of the first codes of a sequence; at most
            log2(N).
    """
    # 1. Use of the entries, in all positions and in each.
    table = np.asarray(codes)
    counts = np.bincount(table[table >= 0], minlength=codebook)
    by_position: list[float] = []
    image_bits = 0.0
    for column in table.T:
        column_codes = column[column >= 0]
        if len(column_codes):
            column_counts = np.bincount(column_codes)
            by_position.append(math.exp(entropy_nats(column_counts)))
            share = len(column_codes) / len(column)
            image_bits += share * math.log2(np.count_nonzero(column_counts))

    # 2. Information in the first codes.
    bits: dict[str, float] = {}
    for length in PREFIXES:
        if length <= table.shape[1]:
            nats = entropy_nats(_distinct_counts(table[:, :length]))
            bits[str(length)] = round(nats / math.log(2), 3)
    return {
        "sequences": len(table),
        "codebook": codebook,
        "used": int((counts > 0).sum()),
        "usage": round(float((counts > 0).mean()), 4),
        "perplexity": round(math.exp(entropy_nats(counts)), 4),
        "position_perplexity": round(float(np.mean(by_position)), 4),
        "image_bits": round(image_bits, 3),
        "distinct": len(_distinct_counts(table)),
        "prefix_bits": bits,
    }


def _distinct_counts(rows: NDArray[np.integer]) -> NDArray[np.int64]:
    """Counts of distinct rows."""
    return np.unique(rows, axis=0, return_counts=True)[1]


def plain(value: Any) -> Any:
    """A report with `Estimate` objects as JSON values."""
    if isinstance(value, Estimate):
        return value.to_json()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
