"""The list of known words contains nano's sentences."""

import random

import pytest
from repository import ROOT
from yaml_tables import read_tables

from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.messages import Message, user_message
from seed_multimodal.language.prompts import SEED_X_TASKS
from seed_nano.words.known_words import KnownWords, read_known_words
from seed_nano.words.read_back import asks_about_picture, note_of, picture_to_change
from seed_nano.world.records import KINDS, record_at, texts_of
from seed_nano.world.things import NAMES, write_known_words

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
    reading = known.read("A pengiun.")
    assert known.notes(reading, reading.changed) == ["Read 'pengiun' as 'penguin'."]
    # A reader of the note has no file of known words: it ends with things, not of a colour's word.
    assert "it learned 150 things, such as planet, " in known.notes("A planetarium.", {})[0]
    assert "such as palm tree, sun, sailboat." in known.notes("a fox on the beach", {})[0]
    (note,) = known.notes("make it green", {}, drawing=True)
    assert note == "This system does not know 'green' of things: it learned 150 things."


def test_nearest_are_of_what_cannot_be_drawn(known):
    for word, things in known.nearest.items():
        assert known.unknown(word, drawing=True) == [word] and {*things} <= {*NAMES}


def test_listed_are_phrases_of_captions(known):
    assert known.listed["things"] == [*NAMES]
    assert known.listed["opposites"] == ["right of", "below"]


@pytest.mark.parametrize("row", TABLES["readings"], ids=str)
def test_read_of_everyday_words(row, known):
    reading = known.read(row["written"])
    assert reading == row["read"]
    assert [*reading.changed] == row.get("told", [])
    again = known.read(reading)
    assert (again, again.changed) == (reading, {})


def test_typing_errors_of_names(known):
    # One letter left out, doubled, or exchanged with the next one, in each name.
    rng = random.Random(5)
    n_right = n_wrong = 0
    names = [name for name in NAMES if len(name) > 3 and name.isalpha()]
    for name in names:
        at = rng.randrange(1, len(name) - 1)
        exchanged = name[:at] + name[at + 1] + name[at] + name[at + 2 :]
        for written in (name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:], exchanged):
            read = known.read(f"draw {written}").removeprefix("draw ")
            n_right += read == name
            n_wrong += read not in (name, written)
    assert n_right >= 0.9 * 3 * len(names)
    assert n_wrong <= 0.02 * 3 * len(names)


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


@pytest.mark.parametrize("row", TABLES["kinds of answers"], ids=str)
def test_questions_about_pictures(row):
    shown = user_message([ImagePart([0]), row["request"]])
    assert asks_about_picture(shown) == row["is_question"]
    assert not asks_about_picture(user_message([row["request"]]))
