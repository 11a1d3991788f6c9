"""VQA accuracy by the official rules and by LaVIT's."""

import pytest

from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.vqa import accuracies, vqa_accuracy, vqa_answer
from seed_multimodal.models.lavit.evaluate import lavit_answer


@pytest.mark.parametrize(
    "text, normalised",
    [
        ("Two dogs.", "2 dogs"),
        ("None", "0"),
        ("an apple, a pear", "apple pear"),
        ("yes !", "yes"),
        ("1,000", "1000"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("t- shirt", "t shirt"),
        ("1,000-2,000 (about)", "10002000 about"),
    ],
)
def test_vqa_answer_follows_the_official_rules(text, normalised):
    # Scores are compared with published ones, to which each of these rules belongs.
    assert vqa_answer(text) == normalised


@pytest.mark.parametrize(
    "answer, annotated, accuracy",
    [
        # Fewer references than ten.
        ("A dog.", ["a dog"], 1.0),
        # Annotations lose punctuation only if they differ, and keep number words.
        ("red, white", ["red, white"] * 10, 0.0),
        ("red, white", ["red, white"] * 9 + ["red"], 1.0),
        ("2", ["two"] * 9 + ["2"], 9 / 3 / 10),
    ],
)
def test_vqa_accuracy_is_the_mean_over_the_other_annotators(answer, annotated, accuracy):
    assert vqa_accuracy(answer, annotated) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    "text, normalised",
    [
        ("It is red.", "red"),
        ("it is very cold", "cold"),
        ("in the very deep sea", "very deep sea"),
        ("in cabin two", "cabin 2"),
        ("Nope", "no"),
        ("I don't know", "unanswerable"),
        ("", "unanswerable"),
    ],
)
def test_lavit_answer_removes_opening_words(text, normalised):
    # LaVIT's own program: its published scores of VizWiz need it.
    assert lavit_answer(text) == normalised


@pytest.mark.parametrize(
    "answer, references, accuracy",
    [
        ("Yes", ["Yes"] * 3, 1.0),
        ("a fox", ["A fox", "The fox"], 1.0),
        ("two", ["2", "Two."], 1.0),
        # Each of two references has the other one to agree with, each of three two.
        ("fox", ["a fox", "a dog"], 1 / 2),
        ("fox", ["a fox", "the fox", "a dog"], (1 / 2 + 1 / 2 + 1) / 3),
    ],
)
def test_references_of_lists_of_ones_own_are_normalised(answer, references, accuracy):
    # Whoever writes "A fox" does not expect it to be wrong, as the official program has it.
    assert vqa_accuracy(answer, references, official=False) == pytest.approx(accuracy)


def test_accuracies_count_an_unanswered_question_as_wrong():
    samples = [Sample(0, "", answer_type="a"), Sample(1, "", answer_type="b")]
    scores = accuracies(samples, [{"answer": "x"}, {"bad": "no image"}], lambda *_: 0.5)
    assert scores == {
        "accuracy": 25.0,
        "per_answer_type": {"a": 50.0, "b": 0.0},
        "per_question_type": {},
    }
