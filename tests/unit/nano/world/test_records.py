"""Records of every kind are functions of (seed, index)."""

import hashlib

import pytest

from seed_nano.world.records import (
    EDIT_CYCLE,
    KINDS,
    X_ONLY_KINDS,
    from_last_image,
    record_at,
    scenes_of,
    x_record_at,
)
from seed_nano.world.splits import SPLITS, held_out, scene_at
from seed_nano.world.tasks import VERDICT_END
from seed_nano.world.words import normalise

NAMING = ("Where", "On which side", "Is there", "Can you see", "Do you see", "Does the picture")


def test_record_at_equals_the_records_of_the_last_training():
    # The shipped weights could not be trained again.
    records = [record_at(kind, 3, index) for kind in KINDS for index in range(20)]
    records += [
        x_record_at(kind, 3, index)
        for kind in ("describe", "questions", "edits", *X_ONLY_KINDS)
        for index in range(20)
    ]
    assert hashlib.sha256(repr(records).encode()).hexdigest()[:16] == "066c3f583c30b7fb"


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS[1:-1])
def test_record_at_in_every_split(split):
    # Some splits lack some sorts of questions and edits.
    for kind in KINDS:
        for index in range(6):  # some splits lack some sorts of questions and edits
            scenes = scenes_of(record_at(kind, 0, index, split))
            assert scenes or kind == "talk"
            assert all(held_out(scene) <= {split} for scene in scenes)


def test_record_at_with_a_pool():
    # Trainings on few scenes measure what more scenes are worth.
    pool = {scene_at(3, position) for position in range(50)}
    for kind in ("captions", "describe", "draw"):
        assert {scenes_of(record_at(kind, 3, index, pool=50))[0] for index in range(30)} < pool
    # The pool's only scene has nothing to remove: the edit is of another one.
    lone = record_at("edits", 3, EDIT_CYCLE.index("remove"), pool=1)
    assert scene_at(3, 0).layout != "left of"
    assert scenes_of(lone)[0].layout == "left of"


def test_answers_about_a_named_thing_start_with_a_verdict():
    # Yes or no first: it is what the small model decides by.
    n_checked = 0
    for index in range(60):
        turns = from_last_image(record_at("questions", 5, index))
        for question, answered in zip(turns[::2], turns[1::2], strict=True):
            before, mark, answer = answered["content"][0].partition(VERDICT_END)
            named = question["content"][-1].startswith(NAMING)
            assert bool(mark) is named or "How many" in question["content"][-1]
            if named:
                n_checked += 1
                assert ("yes" in before) is not normalise(answer).startswith(("no", "there is no"))
    assert n_checked > 60
