"""Scores of the report, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from seed_nano.report import metrics


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


def test_a_collapsed_embedding_never_wins() -> None:
    right = np.eye(5, dtype=bool)
    assert metrics.retrieval_at_k(np.ones((5, 5)), right, 1).sum() == 0
    assert metrics.retrieval_at_k(np.ones((5, 5)), right, 4).sum() == 0


def test_retrieval_at_k_by_hand() -> None:
    similarity = np.array([[0.9, 0.1, 0.5, 0.2], [0.3, 0.2, 0.8, 0.1], [0.4, 0.6, 0.7, 0.5]])
    right = np.eye(4, dtype=bool)[[0, 1, 3]]
    assert metrics.retrieval_at_k(similarity, right, 1).tolist() == [1, 0, 0]  # b is beaten by a and c; d by b and c
    assert metrics.retrieval_at_k(similarity, right, 3).tolist() == [1, 1, 1]
    one = np.array([[np.nan, 0.1, 0.2], [0.1, 0.9, np.nan], [0.1, 0.2, 0.9]])
    assert metrics.retrieval_at_k(one, np.eye(3, dtype=bool), 2).tolist() == [0, 1, 1]  # NaN never wins
