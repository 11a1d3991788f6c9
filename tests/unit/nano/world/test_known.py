"""The list of known words contains nano's sentences."""

import pytest
from repository import ROOT
from systems import load

from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.known_words import KnownWords, read_known_words
from seed_multimodal.language.messages import Message, user_message
from seed_multimodal.language.prompts import SEED_X_TASKS
from seed_multimodal.pipelines.read_back import note_of, picture_to_change
from seed_nano.world.records import KINDS, record_at, texts_of
from seed_nano.world.things import write_known_words

CAT_LEFT = "relation cat left of dog, not dog left of cat"


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


@pytest.mark.parametrize(
    "request_text, unknown, unknown_drawn",
    [
        ("Draw a red car and a zebra.", ["zebra", "red"], ["zebra", "red"]),  # nouns first
        ("A happy dog and a robot.", [], ["robot", "happy"]),  # said, but not drawn
        ("Two cats on the grass", [], []),
        ("A dog and two blue cats", [], ["blue"]),  # backgrounds have colours, things have not
        ("A cat on a blue background", [], []),
        ("Make the background blue.", [], []),
    ],
)
def test_unknown_of_requests(request_text, unknown, unknown_drawn, known):
    assert known.unknown(request_text) == unknown
    assert known.unknown(request_text, drawing=True) == unknown_drawn
    assert "'pengiun' (did you mean 'penguin'?)" in known.note("A pengiun.")
    assert "know 'green' of things:" in known.note("make it green", drawing=True)


@pytest.mark.parametrize(
    "request_, description, differences",
    [
        ("a dog and a cat", "A dog and two cats at night.", ["cat 2, not 1"]),
        ("draw a hot dog, please", "A large noto dog.", ["no hot dog", "also dog"]),
        ("Two cats on the sea.", "A cat at night.", ["cat 1, not 2", "background night, not sea"]),
        ("a dog left of a cat", "a cat left of a dog", [CAT_LEFT]),
        ("a dog left of a cat", "a noto cat to the right of a dog", []),  # seen from the other
        (
            "a noto dog without a cat",
            "a fluent dog and a cat",
            ["also cat", "style fluent, not noto"],
        ),
        ("a dog on the left", "a small dog on the right", ["place right, not left"]),
        ("cats", "a cat", []),  # how many, or which style, was not said
        ("a happy robot", "a crocodile", []),  # nothing that is known: words are noted elsewhere
    ],
)
def test_contradictions_of_a_description(known, request_, description, differences):
    assert known.compared.contradictions(["Here it is.", request_], description) == differences


# Requests of a second turn, and what each note names; of descriptions before and after.
FOX, PIGS = "A noto fox in a meadow.", "Two pigs on the sea."
FOX_DOG = "A noto fox left of a dog in a meadow."
CHANGES = [
    (FOX, "add a dog", "Two dogs in a meadow.", "no fox"),
    (FOX, "Add a dog.", "Two foxes in a meadow.", "no dog"),
    (FOX, "add a penguin", "A fox left of a hedgehog in a meadow.", "no penguin; also hedgehog"),
    (FOX, "And a dog, please.", "A dog left of a fox in a meadow.", ""),
    (FOX, "Turn it into a whale.", "A noto whale in a meadow.", ""),
    (FOX, "Remove it and draw a whale", "A whale in a meadow.", ""),
    (FOX, "remove the fox", "A noto fox left of a dog in a meadow.", "still fox; also dog"),
    (PIGS, "remove one pig", "A pig on the sea.", ""),
    (PIGS, "one more pig please", "Three pigs on a dark background.", "background dark, not sea"),
    (PIGS, "Put them in the dark.", "Two pigs on a dark background.", ""),
    (PIGS, "Change the background.", "Two pigs on a dark background.", ""),
    (PIGS, "Make it night.", "Two pigs at night.", ""),
    (PIGS, "make them bigger", PIGS, "Nothing has changed."),
    (FOX, "Put the fox on the right.", "A noto fox in a meadow", "Nothing has changed."),
    (FOX, "What is this?", FOX, ""),
    (FOX, "Is it small?", FOX, ""),
    (FOX_DOG, "make it bigger", "A noto fox in a meadow.", "no dog"),
    (FOX_DOG, "Swap the fox and the dog.", "A large noto fox in a meadow.", "no dog"),
    (FOX_DOG, "Make the fox bigger.", "A large noto dog in a meadow.", "no fox"),
    (FOX_DOG, "Put the dog above the fox.", FOX_DOG, "relation fox left of dog, not dog above fox"),
    (FOX, "Make it two foxes", "Three noto foxes in a meadow.", "fox 3, not 2"),
    (FOX, "Make the fox a whale.", "A noto whale in a meadow.", ""),
    (FOX, "Change the background to the sea.", "A fox on green.", "background green, not sea"),
]


@pytest.mark.parametrize("before, request_, after, named", CHANGES)
def test_notes_of_changes(known, before, request_, after, named):
    note = note_of(known.compared, "The image", request_, "Here it is.", before, after)
    assert named in note if named else not note


@pytest.mark.parametrize(
    "turns, is_changed",
    [
        (["draw a fox", "add a dog"], True),
        (["draw a fox", "What is it?", "and a dog"], True),
        (["draw a fox", "draw a dog"], False),
        (["draw a fox", "draw a dog next to it"], True),
        (["draw a fox", "two cats"], False),  # perhaps a new picture
        (["draw a fox", "and now a penguin"], False),
        (["draw a fox", "Make me a penguin"], False),
        (["draw a fox", "Is it small?"], False),
        (["draw a fox", "Can you make it bigger?"], True),
        (["add a dog"], False),
    ],
)
def test_picture_that_a_turn_changes(turns, is_changed):
    # Each user's turn but the last is answered with a picture.
    conversation = []
    for index, text in enumerate(turns):
        conversation += user_message([text])
        conversation.append(Message("assistant", (ImagePart([index]),)))
    picture = picture_to_change(conversation[:-1], reads_codes=True)
    assert (picture is not None) == is_changed
    if is_changed:
        assert picture == ImagePart([len(turns) - 2])


@pytest.mark.parametrize(
    "request_, after, differences",
    [
        ("Add a star.", "A fox left of a star.", []),
        ("Add a star.", "A chick left of a fox.", ["no star", "also chick"]),
        ("Remove the banana.", "A small fox.", ["no banana"]),
        ("Remove the fox.", "A dog.", ["also dog"]),
        ("Replace it with a dog.", "A dog.", []),
        ("Make it night.", "A fox at night.", []),
    ],
)
def test_unasked_changes_of_an_edit(known, request_, after, differences):
    assert known.compared.unasked_changes("A large fox.", request_, after) == differences


@pytest.mark.parametrize("name", ["nano", "nano-x", "nano-lavit"])
def test_names_in_capitals_are_read_as_learned(name):
    # People type "Draw a Cat."; the models have never seen a capital there.
    system = load(name)
    texts = ("a Noto CAT LEFT OF a fire Truck", "a noto cat left of a fire truck")
    first, second = system.family.prompts([*map(user_message, texts)], "draw")
    assert first.ids == second.ids
