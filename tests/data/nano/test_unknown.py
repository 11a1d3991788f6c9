"""Words that nano does not know are named; its own sentences and plain English are not."""

import pytest

from seed_multimodal.data.nano.records import KINDS, record_at, texts_of
from seed_multimodal.data.nano.things import NAMES
from seed_multimodal.data.nano.unknown import unknown_note, unknown_words
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
    ("Is there a goat?", ["goat"]), ("Нарисуй кошку", ["нарисуй", "кошку"])])
def test_words_outside_the_world_are_found(text: str, found: list[str]) -> None:
    unknown = unknown_words(text)
    assert [word for word, _ in unknown] == found
    assert all(len(nearest) == 3 and set(nearest) <= set(NAMES) for _, nearest in unknown)


def test_the_nearest_of_an_unknown_word() -> None:
    nearest = dict(unknown_words("a tigr, a ferris and some dogz"))
    assert nearest["tigr"][0] == "tiger" and nearest["ferris"][0] == "ferris wheel" and "dog" in nearest["dogz"]
    assert unknown_note("Draw a panda, please.") == ""
    note = unknown_note("Could you draw me a tigger and a Zebra?")
    assert note.startswith("nano does not know 'tigger', 'zebra': it knows 150 things; nearest: tiger,")
