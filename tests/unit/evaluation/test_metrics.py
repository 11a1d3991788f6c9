"""Bootstrap intervals and codebook statistics."""

import math

import numpy as np
import pytest

from seed_multimodal.evaluation import metrics


def test_codebook_statistics_by_hand():
    codes = np.array([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 1], [0, 2, 0, 2]])
    stats = metrics.codebook_statistics(codes, 8)
    expected = {"sequences": 4, "codebook": 8, "used": 4, "usage": 0.5, "distinct": 3}
    assert {name: stats[name] for name in expected} == expected
    # 6 zeros, 4 ones, 4 twos, 2 threes of 16.
    entropy = -sum(n / 16 * math.log(n / 16) for n in (6, 4, 4, 2))
    assert stats["perplexity"] == round(math.exp(entropy), 4)
    # First code: always 0. First two: (0, 1) three times, (0, 2) once. All four: 2, 1, 1.
    two = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert stats["prefix_bits"] == {"1": 0, "2": round(two, 3), "4": 1.5}
    # Positions: 1; {1:3, 2:1}; {2:2, 0:2}; {3:2, 1:1, 2:1}.
    by_hand = [1.0, 2**two, 2.0, 2**1.5]
    assert stats["position_perplexity"] == round(np.mean(by_hand), 4)
    assert stats["image_bits"] == round(0 + 1 + 1 + math.log2(3), 3)
    shorter = np.array([[0, 1], [3, -1]])  # every other image has a second code, always the same
    assert metrics.codebook_statistics(shorter, 8)["image_bits"] == 1
    assert str(metrics.entropy_nats([3])) == "0.0"  # no -0.000 in a report of one image


def test_bootstrap_agrees_with_the_normal_interval():
    # Intervals of reports are those of a textbook.
    size = 400
    values = np.array([1.0, 1.0, 1.0, 0.0] * (size // 4))
    estimate = metrics.bootstrap(values)
    half = 1.96 * math.sqrt(0.75 * 0.25 / size)
    assert (estimate.value, estimate.n) == (0.75, size)
    assert estimate.low == pytest.approx(0.75 - half, rel=0.01)
    assert estimate.high == pytest.approx(0.75 + half, rel=0.01)
    assert metrics.bootstrap(values) == estimate


def test_bootstrap_by_groups_is_wider_when_groups_agree():
    # Questions about one image are not independent.
    values = np.repeat([1.0, 0.0] * 10, 20)
    alone = metrics.bootstrap(values)
    grouped = metrics.bootstrap(values, groups=np.repeat(np.arange(20), 20).tolist())
    assert grouped.value == alone.value == 0.5
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)


def test_bootstrap_without_values():
    # A report of no samples has no NaN.
    assert metrics.bootstrap([]).to_json() == {"value": None, "low": None, "high": None, "n": 0}


def test_mean_of_means_is_narrower_than_its_parts():
    parts = [metrics.Estimate(0.2, 0.1, 0.4, 10), metrics.Estimate(0.6, 0.5, 0.6, 30)]
    mean = metrics.mean_of_means(parts)
    assert (mean.value, mean.n) == (pytest.approx(0.4), 40)
    assert mean.low == pytest.approx(0.4 - math.hypot(0.1, 0.1) / 2)
    assert mean.high == pytest.approx(0.4 + 0.1)
