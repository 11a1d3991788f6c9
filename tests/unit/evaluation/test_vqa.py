"""VQA accuracy by the official rules and by LaVIT's."""

from __future__ import annotations

import pytest

from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.vqa import accuracies, vqa_accuracy, vqa_answer
from seed_multimodal.models.lavit.evaluate import lavit_answer


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("Two dogs.", "2 dogs"),
        ("None", "0"),
        ("the cat\n", "cat"),
        ("an apple, a pear", "apple pear"),
        ("red/white", "red white"),
        ("yes!", "yes"),
        ("yes !", "yes"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("oclock", "o'clock"),
        ("somebody'd", "somebodyd"),
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("", ""),
        ("1,000-2,000 (about)", "10002000 about"),
    ],
)
def test_vqa_answer_follows_the_official_rules(text, normalised):
    assert vqa_answer(text) == normalised


def test_vqa_accuracy_is_the_mean_over_the_other_nine():
    assert vqa_accuracy("dogs", ["dogs"] * 10) == 1.0
    # Three annotators agree: each of them has 2 others (2/3), each of the other seven has 3 (1).
    assert vqa_accuracy("dogs", ["dogs"] * 3 + ["cats"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("dogs", ["dogs"] + ["cats"] * 9) == pytest.approx(9 / 3 / 10)
    assert vqa_accuracy("birds", ["dogs"] * 10) == 0.0
    assert (
        vqa_accuracy("A dog.", ["a dog"]) == vqa_accuracy("dog", ["dog"] * 3) == 1.0
    )  # fewer references


def test_vqa_accuracy_normalises_differing_annotations_only():
    assert vqa_accuracy("red, white", ["red, white"] * 10) == 0.0  # only the answer loses its comma
    assert vqa_accuracy("red, white", ["red, white"] * 9 + ["red"]) == 1.0
    assert vqa_accuracy("2", ["two"] * 9 + ["2"]) == pytest.approx(
        9 / 3 / 10
    )  # annotations keep number words


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("It is red.", "red"),
        ("she's tired", "tired"),
        ("to eat", "eat"),
        ("a cat", "cat"),
        ("it is very cold", "cold"),
        ("in the very deep sea", "very deep sea"),
        ("very very cold", "very cold"),
        ("inside", "inside"),
        ("to go to school", "go to school"),
        ("in cabin two", "cabin 2"),
        ("on", "on"),
        ("Nope", "no"),
        ("I don't know", "unanswerable"),
        ("i dont know", "unanswerable"),
        ("", "unanswerable"),
        ("the", "unanswerable"),
    ],
)
def test_lavit_answer_removes_opening_words(text, normalised):
    assert lavit_answer(text) == normalised


def test_vqa_accuracy_with_lavits_rule():
    assert vqa_accuracy("It is nope", ["no"] * 10, lavit_answer) == 1.0
    assert (
        vqa_accuracy("it is red", ["it is red"] * 10, lavit_answer) == 0.0
    )  # annotations are not shortened


def test_accuracies_by_type():
    samples = [
        Sample(key, "", references=["yes"], answer_type=kind, question_type="is it")
        for key, kind in enumerate(("yes/no", "yes/no", "other"))
    ]
    shares = accuracies(
        samples, ["yes", "no", None], lambda answer, sample: float(answer in sample.references)
    )
    assert shares == {
        "accuracy": 33.33,
        "per_answer_type": {"yes/no": 50.0, "other": 0.0},
        "per_question_type": {"is it": 33.33},
    }
