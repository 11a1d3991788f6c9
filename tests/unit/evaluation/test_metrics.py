"""Bootstrap intervals and codebook statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from seed_multimodal.evaluation import metrics


def test_codebook_statistics_by_hand():
    codes = np.array([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 1], [0, 2, 0, 2]])
    stats = metrics.codebook_statistics(codes, 8)
    assert [stats[key] for key in ("sequences", "codebook", "used", "usage", "distinct")] == [
        4,
        8,
        4,
        0.5,
        3,
    ]
    # 6 zeros, 4 ones, 4 twos, 2 threes of 16.
    entropy = -(
        6 / 16 * math.log(6 / 16) + 2 * 4 / 16 * math.log(4 / 16) + 2 / 16 * math.log(2 / 16)
    )
    assert stats["perplexity"] == round(math.exp(entropy), 4)
    assert str(metrics.entropy_nats([3])) == "0.0"  # no -0.000 in a report of one image
    # First code: always 0. First two: (0, 1) three times, (0, 2) once. All four: 2, 1, 1.
    bits = stats["prefix_bits"]
    assert bits["1"] == 0
    assert bits["2"] == round(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)), 3)
    assert bits["4"] == 1.5
    assert list(bits) == ["1", "2", "4"]
    # Positions: 1; {1:3, 2:1}; {2:2, 0:2}; {3:2, 1:1, 2:1}.
    by_hand = [
        1.0,
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))),
        2.0,
        math.exp(1.5 * math.log(2)),
    ]
    assert stats["position_perplexity"] == round(np.mean(by_hand), 4)


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.array([1.0] * 300 + [0.0] * 100)
    estimate = metrics.bootstrap(values)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (estimate.value, estimate.n) == (0.75, 400)
    assert estimate.low == pytest.approx(0.75 - half, abs=0.008)
    assert estimate.high == pytest.approx(0.75 + half, abs=0.008)
    assert metrics.bootstrap(values) == estimate


def test_bootstrap_by_groups_is_wider_when_groups_agree():
    values = np.repeat([1.0, 0.0] * 10, 20)
    alone = metrics.bootstrap(values)
    grouped = metrics.bootstrap(values, groups=np.repeat(np.arange(20), 20).tolist())
    assert grouped.value == alone.value == 0.5
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)
    # Groups of one are the plain bootstrap.
    assert metrics.bootstrap(values, groups=list(range(400))) == alone


def test_bootstrap_without_values():
    estimate = metrics.bootstrap([])
    assert estimate.to_json() == {"value": None, "low": None, "high": None, "n": 0}


def test_bootstrap_of_many_values_is_the_normal_interval(monkeypatch):
    values = np.random.default_rng(0).random(3000)
    groups = (np.arange(3000) // 3).tolist()
    drawn = metrics.bootstrap(values), metrics.bootstrap(values, groups)
    monkeypatch.setattr(metrics, "LARGE", 100)
    for sampled, normal in zip(
        drawn, (metrics.bootstrap(values), metrics.bootstrap(values, groups)), strict=True
    ):
        assert (sampled.low, sampled.high) == pytest.approx((normal.low, normal.high), abs=1e-3)


def test_bootstrap_in_parts_is_the_same(monkeypatch):
    whole = metrics.bootstrap(np.arange(500.0))
    monkeypatch.setattr(metrics, "INDICES_PER_CHUNK", 3 * 500)
    assert metrics.bootstrap(np.arange(500.0)) == whole
