"""Words that nano's systems do not know are named; their own sentences and plain English are not."""

import itertools
import time
from pathlib import Path

import pytest

from seed_multimodal.language.tasks import DEMO_QUESTIONS, DESCRIBE_PROMPT, SEED_X_TASKS
from seed_multimodal.systems.domain import KnownWords, read_known_words
from seed_nano.world.known import EXAMPLES, write_known_words
from seed_nano.world.records import KINDS, record_at, texts_of
from seed_nano.world.things import NAMES


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> KnownWords:
    file = tmp_path_factory.mktemp("known") / "known_words.json"
    write_known_words(file)
    return read_known_words(file)


def test_unknown_of_what_nano_is_trained_with(known: KnownWords) -> None:
    for kind in KINDS:
        for index in range(120):
            for text in texts_of(record_at(kind, 9, index)):
                assert set(known.unknown(text)) <= {"ten", "fifty", "hundred"}, text  # what nano says of itself
    for text in (DESCRIBE_PROMPT, DEMO_QUESTIONS[1], SEED_X_TASKS.describe, SEED_X_TASKS.detect_request("the dog")):
        assert known.unknown(text) == []


@pytest.mark.parametrize("name", ["nano", "nano-x", "nano-lavit"])
def test_shipped_known_words(name: str, known: KnownWords) -> None:
    shipped = Path(__file__).parents[3] / "pretrained" / name / "known_words.json"
    assert read_known_words(shipped) == known


@pytest.mark.parametrize(("text", "found"), [
    ("Draw a zebra on a blue background.", ["zebra"]), ("Two goats and a noto cat", ["goats"]), ("a tigr", ["tigr"]),
    ("draw ZEBRA, gnu and zebra!", ["zebra", "gnu"]), ("Please draw three fire trucks at night.", []), ("", []),
    ("What's in the dog's picture?", []), ("Can you show me 4 pine trees above the sea, please?", []), ("?!", []),
    ("Could you make it much bigger for me now", []), ("a fire", ["fire"]), ("Zeichne einen Löwen", ["zeichne", "einen",
    "löwen"]),
    ("Is there a goat?", ["goat"]), ("a dog_cat left-of the 2nd fox, noto-style", []), ("a zebra-like dog", ["zebra"]),
    ("2nd", []), ("_zebra_", ["zebra"]), ("left-of a tree", []),
    ("Draw seven dogs", ["seven"]), ("5 cats and 12 dogs", ["5", "12"]), ("four dogs, 3 cats", []), ("0.7 of it", []),
    ("Isn't there a dog? I can't see one, and the cat doesn't look at me", []),
    ("Нарисуй кошку", ["нарисуй", "кошку"]), ("画一只 狗", ["画一只", "狗"]), ("Draw 🐶 and ☃️!", ["🐶", "☃"])])
def test_unknown_of_words_and_numbers(text: str, found: list[str], known: KnownWords) -> None:
    assert known.unknown(text) == found


def test_note_gives_examples_by_meaning_or_none(known: KnownWords) -> None:
    start, learned = "This system does not know", "it learned 150 things, up to four of each"
    assert known.note("Draw an animal.") == f"{start} 'animal': {learned}, such as cat, dog, horse."
    assert known.note("Which birds are there?").endswith("such as owl, penguin, duck.")
    assert known.note("Draw seven dogs.").endswith("such as two, three, four.")
    for text in ("a tigr and a Zebra", "Нарисуй кошку", "Draw 🐶."):
        assert known.note(text).endswith(f": {learned}.")
    assert known.note("Draw a panda, please.") == ""
    names = {name for examples in EXAMPLES.values() for name in examples.split(", ")}
    assert names - {"two", "three", "four"} <= set(NAMES)


def test_note_of_a_long_request(known: KnownWords) -> None:
    start = time.process_time()
    words = ["".join(letters) for letters in itertools.product("bcdfghjklmn", "qvwxz", "bcdfg", "qvwxz")]
    note = known.note(" ".join(words))
    assert note.startswith("This system does not know 'bqbq', 'bqbv', 'bqbw': ") and len(note) < 200
    assert len(known.note("q" * 30_000)) < 200
    assert time.process_time() - start < 0.5
