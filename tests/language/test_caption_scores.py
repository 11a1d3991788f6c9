"""Caption scores: by hand, and as pycocoevalcap 1.2 computed them; words as the Penn Treebank tokeniser cuts them."""

from __future__ import annotations

import math

import pytest

from seed_multimodal.errors import DataError
from seed_multimodal.language.caption_scores import caption_scores, caption_words

CAPTIONS = {1: "A man rides a horse on the beach.", 2: "two dogs play", 3: "a bowl of soup and a spoon", 4: ""}
REFERENCES = {
    1: ["a man is riding a horse on a beach", "A man rides a brown horse along the beach."],
    2: ["two dogs are playing in the snow", "dogs playing", "two brown dogs play with a ball"],
    3: ["a bowl of soup", "soup in a bowl next to a spoon"],
    4: ["a red bus", "the bus in the street"]}
# Of pycocoevalcap 1.2 (its PTBTokenizer, Bleu(4), Rouge, Cider) on these captions.
RECORDED = {"Bleu_1": 0.756251991559624, "Bleu_2": 0.6960225603229276, "Bleu_3": 0.5447223175843202,
            "Bleu_4": 0.4118136873107139, "ROUGE_L": 0.5521604394240777, "CIDEr": 2.347696522587433}


def test_scores_equal_the_reference_implementation():
    made = caption_scores(CAPTIONS, REFERENCES)
    assert made == pytest.approx(RECORDED, abs=1e-9)


def test_bleu_by_hand():
    # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples stand in the reference, no quadruple; five words there: e^(1 - 5/4).
    made = caption_scores({1: "a b c x"}, {1: ["a b c d e"]})
    brevity = math.exp(1 - 5 / 4)
    assert made["Bleu_1"] == pytest.approx(brevity * 3 / 4)
    assert made["Bleu_3"] == pytest.approx(brevity * (3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3))
    assert made["Bleu_4"] == 0.0


def test_a_set_of_one_picture_has_no_cider_and_equal_captions_have_ten():
    # log(1) = 0: every word stands in all (one) pictures. Two pictures without a common word: cosine 1 in each order.
    assert caption_scores({1: "a b c d"}, {1: ["a b c d"]})["CIDEr"] == 0.0
    both = caption_scores({1: "a b c d", 2: "e f g h"}, {1: ["a b c d"], 2: ["e f g h"]})
    assert both["CIDEr"] == pytest.approx(10.0) and both["ROUGE_L"] == pytest.approx(1.0)


@pytest.mark.parametrize(("text", "words"), [
    ("A man's dog isn't here (really), it's \"fun\".",
     "a man 's dog is n't here -lrb- really -rrb- it 's fun"),
    ("Two-thirds of 1,000 U.S. cars; 3.5 m tall!", "two-thirds of 1,000 u.s. cars 3.5 m tall"),
    ("A 10:30 clock, 50% off - great", "a 10:30 clock 50 % off great"), ("one o'clock", "one o'clock"),
    ("caf\u00e9 au lait", "caf\u00e9 au lait"), ("  ...  ", ""),
    ("the 21st of 100s, a 50mm lens and a 1950's bus of the '90s",
     "the 21st of 100s a 50mm lens and a 1950 's bus of the '90s"),
    ("a black/white 3-way sign w/ a 737-800 at 10:30am, 3,000ft and 3.5-inch",
     "a black/white 3-way sign w / a 737-800 at 10:30 am 3,000 ft and 3.5-inch"),
    ("Mr. Bean at Main St. in no. 7, no. Look!! What?! A.", "mr. bean at main st. in no. 7 no look !! what ?! a."),
    ("a dog.cat at www.example.com - O'Brien, y'all cannot say 'tis rock'n'roll",
     "a dog.cat at www.example.com o'brien y' all can not say 't is rock 'n' roll"),
    ("a \U0001f98a \u2026 fox \u2014 \u00bd cup for \u00a35 :) #dog #1",
     "a fox 1/2 cup for # 5 :-rrb- #dog # 1"),
    ("--... Ph.D. AT&T r&b [x]", "ph.d. at&t r & b -lsb- x -rsb-")])
def test_words(text, words):  # as stanford-corenlp 3.4.1 (in pycocoevalcap) gave them
    assert caption_words(text) == words.split()


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(DataError, match="no caption to score"):
        caption_scores({}, {})
    with pytest.raises(DataError, match="Picture 7 has no reference"):
        caption_scores({7: "a"}, {7: []})
