"""The list of known words contains nano's sentences."""

import pytest
from repository import ROOT
from systems import load
from yaml_tables import read_tables

from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.known_words import KnownWords, read_known_words
from seed_multimodal.language.messages import Message, user_message
from seed_multimodal.language.prompts import SEED_X_TASKS
from seed_multimodal.pipelines.read_back import note_of, picture_to_change
from seed_nano.world.records import KINDS, record_at, texts_of
from seed_nano.world.things import write_known_words

TABLES = read_tables(__file__)


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> KnownWords:
    file = tmp_path_factory.mktemp("known") / "known_words.json"
    write_known_words(file)
    return read_known_words(file)


@pytest.mark.slow
def test_unknown_of_training_records(known):
    # `draw` would warn of words that nano was trained on.
    for kind in KINDS:
        if kind == "requests" or kind.startswith("typed"):  # they name what cannot be drawn, too
            continue
        for index in range(120):
            for text in texts_of(record_at(kind, 9, index)):
                assert set(known.unknown(text)) <= {"ten", "fifty", "hundred"}, (
                    text
                )  # of sentences about nano
    assert known.unknown(SEED_X_TASKS.detect_request("the dog")) == []


@pytest.mark.parametrize("name", ["nano", "nano-x", "nano-lavit"])
def test_read_known_words_of_the_shipped_systems(name, known):
    shipped = ROOT / "pretrained" / name / "known_words.json"
    assert read_known_words(shipped) == known


@pytest.mark.parametrize("row", TABLES["unknown"], ids=str)
def test_unknown_of_requests(row, known):
    assert known.unknown(row["request"]) == row["unknown"]
    assert known.unknown(row["request"], drawing=True) == row["undrawable"]
    assert "'pengiun' (did you mean 'penguin'?)" in known.note("A pengiun.")
    assert "know 'green' of things:" in known.note("make it green", drawing=True)


@pytest.mark.parametrize("row", TABLES["contradictions"], ids=str)
def test_contradictions_of_a_description(known, row):
    requests = ["Here it is.", row["request"]]
    assert known.compared.contradictions(requests, row["description"]) == row["differences"]


@pytest.mark.parametrize("row", TABLES["changes"], ids=str)
def test_notes_of_changes(known, row):
    texts = (row["request"], "Here it is.", row["before"], row["after"])
    note = note_of(known.compared, "The image", *texts)
    assert row["named"] in note if row["named"] else not note


@pytest.mark.parametrize("row", TABLES["turns"], ids=str)
def test_picture_that_a_turn_changes(row):
    # Each user's turn but the last is answered with a picture.
    conversation = []
    for index, text in enumerate(row["turns"]):
        conversation += user_message([text])
        conversation.append(Message("assistant", (ImagePart([index]),)))
    picture = picture_to_change(conversation[:-1], reads_codes=True)
    last = ImagePart([len(row["turns"]) - 2])
    assert picture == (last if row["is_changed"] else None)


@pytest.mark.parametrize("row", TABLES["edits"], ids=str)
def test_unasked_changes_of_an_edit(known, row):
    changes = known.compared.unasked_changes("A large fox.", row["request"], row["after"])
    assert changes == row["differences"]


@pytest.mark.parametrize("name", ["nano", "nano-x", "nano-lavit"])
def test_names_in_capitals_are_read_as_learned(name):
    # People type "Draw a Cat."; the models have never seen a capital there.
    system = load(name)
    texts = ("a Noto CAT LEFT OF a fire Truck", "a noto cat left of a fire truck")
    first, second = system.family.prompts([*map(user_message, texts)], "draw")
    assert first.ids == second.ids
