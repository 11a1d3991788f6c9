"""VQA accuracy: by hand, and the official evaluation's quirks."""

from __future__ import annotations

import pytest

from seed_multimodal.evaluation.vqa_accuracy import vqa_accuracy, vqa_answer


@pytest.mark.parametrize(("given", "compared"), [
    ("Two dogs.", "2 dogs"), ("None", "0"), ("the cat\n", "cat"), ("an apple, a pear", "apple pear"),
    ("red/white", "red white"), ("yes!", "yes"), ("yes !", "yes"), ("1,000", "1000"), ("3.5", "3.5"), ("U.S.", "us"),
    ("dont know", "don't know"), ("couldntve", "couldntve"), ("couldnt've", "couldn't've"), ("oclock", "o'clock"),
    ("somebody'd", "somebodyd"), ("t-shirt", "t shirt"), ("t- shirt", "t shirt"), ("", "")])
def test_answers_are_normalised_by_the_official_rules(given, compared):
    assert vqa_answer(given) == compared


def test_a_comma_inside_a_number_takes_all_punctuation_away():
    assert vqa_answer("1,000-2,000 (about)") == "10002000 about"


def test_accuracy_is_the_mean_over_the_other_nine():
    assert vqa_accuracy("dogs", ["dogs"] * 10) == 1.0
    # Three annotators agree: each of them has 2 others (2/3), each of the other seven has 3 (1).
    assert vqa_accuracy("dogs", ["dogs"] * 3 + ["cats"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("dogs", ["dogs"] + ["cats"] * 9) == pytest.approx(9 / 3 / 10)
    assert vqa_accuracy("birds", ["dogs"] * 10) == 0.0


def test_annotations_lose_punctuation_only_where_they_differ():
    assert vqa_accuracy("red, white", ["red, white"] * 10) == 0.0  # the answer has lost its comma, they have not
    assert vqa_accuracy("red, white", ["red, white"] * 9 + ["red"]) == 1.0
    assert vqa_accuracy("2", ["two"] * 9 + ["2"]) == pytest.approx(9 / 3 / 10)  # theirs keep number words
