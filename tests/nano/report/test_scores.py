"""Scores of the report, by hand."""

from __future__ import annotations

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
