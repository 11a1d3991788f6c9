"""VQA accuracy: by hand, and the official evaluation's quirks."""

from __future__ import annotations

import pytest

from seed_multimodal.evaluation.vqa_accuracy import lavit_answer, vqa_accuracy, vqa_answer


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


@pytest.mark.parametrize(("given", "compared", "original"), [
    ("It is red.", "red", "red"), ("this is a dog", "dog", "dog"), ("she's tired", "tired", "tired"),
    ("very big", "big", "big"), ("for fun", "fun", "fun"), ("to eat", "eat", "eat"), ("in water", "water", "water"),
    ("on table", "table", "table"), ("at home", "home", "home"), ("a cat", "cat", "cat"), ("an ant", "ant", "ant"),
    ("the end", "end", "end"), ("in the very deep sea", "very deep sea", "very deep sea"),
    ("it is very cold", "cold", "cold"), ("very very cold", "very cold", "cold"), ("inside", "inside", "inside"),
    ("to go to school", "go to school", "school"), ("in cabin two", "cabin 2", "2"), ("on", "on", "on"),
    ("Nope", "no", "no"), ("I don't know", "unanswerable", "unanswerable"), ("i dont know", "unanswerable", None),
    ("i do n't know", "unanswerable", "unanswerable"), ("i need to know", "unanswerable", "unanswerable"),
    ("", "unanswerable", "unanswerable"), ("the", "unanswerable", "unanswerable"), ("two dogs!", "2 dogs", "2 dogs")])
def test_lavit_takes_the_front_of_answers_off(given, compared, original):
    assert lavit_answer(given) == compared
    assert original is None or lavit_answer(given, legacy=True) == original


def test_a_rule_is_what_is_made_of_the_answer():
    assert vqa_answer("nope") == "nope" and vqa_accuracy("in nope", ["in no"] * 10) == 0.0
    assert vqa_accuracy("It is nope", ["no"] * 10, lavit_answer) == 1.0
    assert vqa_accuracy("it is red", ["it is red"] * 10, lavit_answer) == 0.0  # annotations keep their fronts
