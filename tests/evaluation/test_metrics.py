"""Every number of the report card against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from seed_multimodal.errors import DataError
from seed_multimodal.evaluation import metrics


def test_retrieval_by_hand() -> None:
    similarity = np.array([[0.9, 0.1, 0.5, 0.2], [0.3, 0.2, 0.8, 0.1], [0.4, 0.6, 0.7, 0.5]])
    right = np.eye(4, dtype=bool)[[0, 1, 3]]
    # a is first; b is beaten by a and c; d is beaten by b and c.
    assert metrics.retrieval_ranks(similarity, right).tolist() == [0, 2, 2]
    assert metrics.retrieval_at_k(similarity, right, 1).tolist() == [1, 0, 0]
    assert metrics.retrieval_at_k(similarity, right, 3).tolist() == [1, 1, 1]


def test_retrieval_takes_the_best_of_several_right_items() -> None:
    similarity = np.array([[0.1, 0.9, 0.5]])
    assert metrics.retrieval_ranks(similarity, np.array([[True, False, True]])).tolist() == [1]
    assert metrics.retrieval_ranks(similarity, np.array([[True, True, False]])).tolist() == [0]


def test_a_collapsed_embedding_never_wins() -> None:
    right = np.eye(5, dtype=bool)
    assert metrics.retrieval_at_k(np.ones((5, 5)), right, 1).sum() == 0
    assert metrics.retrieval_at_k(np.ones((5, 5)), right, 4).sum() == 0


def test_what_is_no_number_never_wins() -> None:
    nan, right = np.nan, np.eye(3, dtype=bool)
    assert metrics.retrieval_ranks(np.full((3, 3), nan), right).tolist() == [2, 2, 2]
    one = np.array([[nan, 0.1, 0.2], [0.1, 0.9, nan], [0.1, 0.2, 0.9]])
    assert metrics.retrieval_ranks(one, right).tolist() == [2, 1, 0]


def test_retrieval_refuses_bad_input() -> None:
    with pytest.raises(DataError, match="query 1 has no right answer"):
        metrics.retrieval_ranks(np.ones((2, 2)), np.array([[True, False], [False, False]]))
    with pytest.raises(DataError, match="one \\[Q, G\\] shape"):
        metrics.retrieval_ranks(np.ones((2, 3)), np.ones((2, 2), dtype=bool))


def test_chance() -> None:
    assert metrics.chance_at_k(np.eye(4, dtype=bool), 1) == pytest.approx(0.25)
    # 2 of 4 right: the first two both wrong with probability 2/4 * 1/3 = 1/6.
    assert metrics.chance_at_k(np.array([[True, True, False, False]]), 2) == pytest.approx(5 / 6)
    assert metrics.chance_at_k(np.eye(3, dtype=bool), 5) == 1.0


def test_cosine() -> None:
    a = np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    b = np.array([[0.0, 2.0], [4.0, 3.0], [1.0, 0.0]])
    assert metrics.cosine(a, b) == pytest.approx([0.0, 0.96, 0.0])


def test_codebook_by_hand() -> None:
    codes = np.array([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 1], [0, 2, 0, 2]])
    stats = metrics.codebook_statistics(codes, 8)
    assert [stats[key] for key in ("sequences", "codebook", "used", "usage", "distinct")] == [4, 8, 4, 0.5, 3]
    # 6 zeros, 4 ones, 4 twos, 2 threes of 16.
    entropy = -(6 / 16 * math.log(6 / 16) + 2 * 4 / 16 * math.log(4 / 16) + 2 / 16 * math.log(2 / 16))
    assert stats["perplexity"] == round(math.exp(entropy), 4)
    assert str(metrics.entropy_nats([3])) == "0.0"  # no -0.000 in a report of one picture
    # First code: always 0. First two: (0, 1) three times, (0, 2) once. All four: 2, 1, 1.
    bits = stats["prefix_bits"]
    assert bits["1"] == 0
    assert bits["2"] == round(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)), 3)
    assert bits["4"] == 1.5
    assert list(bits) == ["1", "2", "4"]
    # Positions: 1; {1:3, 2:1}; {2:2, 0:2}; {3:2, 1:1, 2:1}.
    by_hand = [1.0, math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))), 2.0, math.exp(1.5 * math.log(2))]
    assert stats["position_perplexity"] == round(np.mean(by_hand), 4)


def test_codebook_refuses_bad_codes() -> None:
    with pytest.raises(DataError, match="outside the codebook 0..3"):
        metrics.codebook_statistics(np.array([[0, 4]]), 4)
    with pytest.raises(DataError, match="shape"):
        metrics.codebook_statistics(np.zeros((0, 4), dtype=int), 4)


@pytest.mark.parametrize(("answer", "truth", "same"), [
    ("A cat.", "cat", True), ("the Cat", "cat", True), ("Two", "2", True), ("yes", "no", False),
    ("cats", "cat", False), ("", "cat", False), ("red-haired  man", "red haired man", True),
])
def test_answers(answer: str, truth: str, same: bool) -> None:
    assert metrics.same_answer(answer, truth) is same


def test_majority_baseline() -> None:
    train = [("colour", "red"), ("colour", "red"), ("colour", "blue"), ("yesno", "Yes"), ("yesno", "no."),
             ("yesno", "yes")]
    test = [("colour", "red"), ("colour", "blue"), ("yesno", "yes"), ("new", "x")]
    assert metrics.majority_baseline(train, test).tolist() == [1, 0, 1, 0]


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.array([1.0] * 300 + [0.0] * 100)
    estimate = metrics.bootstrap(values)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (estimate.value, estimate.n) == (0.75, 400)
    assert estimate.low == pytest.approx(0.75 - half, abs=0.008)
    assert estimate.high == pytest.approx(0.75 + half, abs=0.008)
    assert metrics.bootstrap(values) == estimate


def test_bootstrap_by_groups_is_wider_when_groups_agree() -> None:
    values = np.repeat([1.0, 0.0] * 10, 20)
    alone = metrics.bootstrap(values)
    grouped = metrics.bootstrap(values, groups=np.repeat(np.arange(20), 20).tolist())
    assert grouped.value == alone.value == 0.5
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)
    # Groups of one are the plain bootstrap.
    assert metrics.bootstrap(values, groups=list(range(400))) == alone
    with pytest.raises(DataError, match="400 values but 2"):
        metrics.bootstrap(values, groups=["a", "b"])


def test_empty_estimate() -> None:
    estimate = metrics.bootstrap([])
    assert estimate.to_json() == {"value": None, "low": None, "high": None, "n": 0}
