"""The list of known words contains nano's sentences."""

import pytest
from repository import ROOT

from seed_multimodal.language.known_words import KnownWords, read_known_words
from seed_multimodal.language.prompts import SEED_X_TASKS
from seed_nano.world.records import KINDS, record_at, texts_of
from seed_nano.world.things import write_known_words


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> KnownWords:
    file = tmp_path_factory.mktemp("known") / "known_words.json"
    write_known_words(file)
    return read_known_words(file)


@pytest.mark.slow
def test_unknown_of_training_records(known: KnownWords):
    # `draw` would warn of words that nano was trained on.
    for kind in KINDS:
        if kind == "requests":  # they name what cannot be drawn, too
            continue
        for index in range(120):
            for text in texts_of(record_at(kind, 9, index)):
                assert set(known.unknown(text)) <= {"ten", "fifty", "hundred"}, (
                    text
                )  # of sentences about nano
    assert known.unknown(SEED_X_TASKS.detect_request("the dog")) == []


@pytest.mark.parametrize("name", ["nano", "nano-x", "nano-lavit"])
def test_read_known_words_of_the_shipped_systems(name, known: KnownWords):
    shipped = ROOT / "pretrained" / name / "known_words.json"
    assert read_known_words(shipped) == known


@pytest.mark.parametrize(
    ("request_text", "unknown", "unknown_drawn"),
    [
        ("Draw a red car and a zebra.", ["zebra", "red"], ["zebra", "red"]),  # nouns first
        ("A happy dog and a robot.", [], ["robot", "happy"]),  # said, but not drawn
        ("Two cats on the grass", [], []),
    ],
)
def test_unknown_of_requests(request_text, unknown, unknown_drawn, known: KnownWords):
    assert known.unknown(request_text) == unknown
    assert known.unknown(request_text, drawing=True) == unknown_drawn
    assert "'pengiun' (did you mean 'penguin'?)" in known.note("A pengiun.")
