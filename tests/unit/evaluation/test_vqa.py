"""VQA accuracy by the official rules and by LaVIT's."""

from __future__ import annotations

import pytest

from seed_multimodal.evaluation.vqa import vqa_accuracy, vqa_answer
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


@pytest.mark.parametrize(
    ("answer", "annotated", "accuracy"),
    [
        ("birds", ["dogs"] * 10, 0.0),
        # Fewer references.
        ("A dog.", ["a dog"], 1.0),
        ("dog", ["dog"] * 3, 1.0),
        # Annotations lose punctuation only if they differ, and keep number words.
        ("red, white", ["red, white"] * 10, 0.0),
        ("red, white", ["red, white"] * 9 + ["red"], 1.0),
        ("2", ["two"] * 9 + ["2"], 9 / 3 / 10),
    ],
)
def test_vqa_accuracy_is_the_mean_over_the_other_annotators(answer, annotated, accuracy):
    assert vqa_accuracy(answer, annotated) == pytest.approx(accuracy)


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
    # Annotations are not shortened.
    assert vqa_accuracy("it is red", ["it is red"] * 10, lavit_answer) == 0.0
