"""Words that nano does not know are named; its own sentences and plain English are not."""

import itertools
import time

import pytest

from seed_multimodal.data.nano.records import KINDS, record_at, texts_of
from seed_multimodal.data.nano.things import NAMES
from seed_multimodal.data.nano.unknown import nearest_things, unknown_note, unknown_words
from seed_multimodal.language.tasks import DEMO_QUESTIONS, DESCRIBE_PROMPT


def test_nothing_that_nano_is_trained_with_is_unknown() -> None:
    for kind in KINDS:
        for index in range(120):
            for text in texts_of(record_at(kind, 9, index)):
                assert unknown_words(text) == [], text
    assert unknown_words(DESCRIBE_PROMPT) == unknown_words(DEMO_QUESTIONS[1]) == []


@pytest.mark.parametrize(("text", "found"), [
    ("Draw a zebra on a blue background.", ["zebra"]), ("Two goats and a noto cat", ["goats"]), ("a tigr", ["tigr"]),
    ("draw ZEBRA, gnu and zebra!", ["zebra", "gnu"]), ("Please draw three fire trucks at night.", []), ("", []),
    ("What's in the dog's picture?", []), ("Can you show me 4 pine trees above the sea, please?", []), ("?! 12", []),
    ("Could you make it much bigger for me now", []), ("a fire", ["fire"]), ("Zeichne einen Löwen", ["zeichne", "einen",
    "löwen"]),
    ("Is there a goat?", ["goat"]), ("a dog_cat left-of the 2nd fox, noto-style", []), ("a zebra-like dog", ["zebra"]),
    ("2nd", []), ("_zebra_", ["zebra"]), ("left-of a tree", []),
    ("Isn't there a dog? I can't see one, and the cat doesn't look at me", []),
    ("Нарисуй кошку", ["нарисуй", "кошку"]), ("画一只 狗", ["画一只", "狗"]), ("Draw 🐶 and ☃️!", ["🐶", "☃"])])
def test_words_outside_the_world_are_found(text: str, found: list[str]) -> None:
    assert unknown_words(text) == found
    assert all(set(nearest_things(word)) <= set(NAMES) for word in found)
    assert all(len(nearest_things(word)) == 3 for word in found if word.isascii())


@pytest.mark.parametrize("text", ["Нарисуй кошку", "狗", "Draw 🐶."])
def test_no_thing_is_called_near_to_a_word_that_shares_no_letter_with_it(text: str) -> None:
    assert unknown_note(text).endswith(": it knows 150 things, by their English names.")


def test_the_nearest_of_an_unknown_word() -> None:
    assert nearest_things("tigr")[0] == "tiger" and nearest_things("ferris")[0] == "ferris wheel"
    assert "dog" in nearest_things("dogz")
    assert unknown_note("Draw a panda, please.") == ""
    note = unknown_note("Could you draw me a tigger and a Zebra?")
    assert note.startswith("nano does not know 'tigger', 'zebra': it knows 150 things; nearest: tiger,")


def test_a_long_request_is_answered_at_once_and_shortly() -> None:
    start = time.process_time()
    words = ["".join(letters) for letters in itertools.product("bcdfghjklmn", "qvwxz", "bcdfg", "qvwxz")]
    note = unknown_note(" ".join(words))
    assert note.startswith("nano does not know 'bqbq', 'bqbv', 'bqbw': ") and len(note) < 200
    assert len(unknown_note("q" * 30_000)) < 200
    assert time.process_time() - start < 0.5  # the nearest things of one word, not of each: 1 ms a word
