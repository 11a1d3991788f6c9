"""The list of known words: nano's own sentences are known, other words are named with known examples."""

from pathlib import Path

import pytest

from seed_multimodal.language.tasks import DEMO_QUESTIONS, DESCRIBE_PROMPT, SEED_X_TASKS
from seed_multimodal.systems.domain import KnownWords, read_known_words
from seed_nano.world.records import KINDS, record_at, texts_of
from seed_nano.world.words import write_known_words


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> KnownWords:
    file = tmp_path_factory.mktemp("known") / "known_words.json"
    write_known_words(file)
    return read_known_words(file)


def test_unknown_of_training_records(known: KnownWords) -> None:
    for kind in KINDS:
        for index in range(120):
            for text in texts_of(record_at(kind, 9, index)):
                assert set(known.unknown(text)) <= {"ten", "fifty", "hundred"}, text  # what nano says of itself
    for text in (DESCRIBE_PROMPT, DEMO_QUESTIONS[1], SEED_X_TASKS.describe, SEED_X_TASKS.detect_request("the dog")):
        assert known.unknown(text) == []


@pytest.mark.parametrize("name", ["nano", "nano-x", "nano-lavit"])
def test_shipped_known_words(name: str, known: KnownWords) -> None:
    shipped = Path(__file__).parents[4] / "pretrained" / name / "known_words.json"
    assert read_known_words(shipped) == known


@pytest.mark.parametrize(("text", "found"), [
    ("Draw a zebra on a blue background.", ["zebra"]), ("Two goats and a noto cat", ["goats"]), ("a tigr", ["tigr"]),
    ("Please draw three fire trucks at night.", []), ("", []), ("What's in the dog's picture?", []),
    ("a dog_cat left-of the 2nd fox, noto-style", []), ("Draw seven dogs", ["seven"]), ("5 cats, 12 dogs", ["5", "12"]),
    ("Isn't there a dog? I can't see one", []), ("Нарисуй кошку", ["нарисуй", "кошку"])])
def test_unknown_of_words_and_numbers(text: str, found: list[str], known: KnownWords) -> None:
    assert known.unknown(text) == found


def test_note_gives_examples_by_meaning_or_none(known: KnownWords) -> None:
    start, learned = "This system does not know", "it learned 150 things, up to four of each"
    assert known.note("Draw an animal.") == f"{start} 'animal': {learned}, such as cat, dog, horse."
    assert known.note("Draw seven dogs.").endswith("such as two, three, four.")
    assert known.note("a tigr and a Zebra").endswith(f": {learned}.")
    assert known.note("Draw a panda, please.") == ""
