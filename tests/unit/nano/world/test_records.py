"""Records of every kind are functions of (seed, index)."""

import hashlib

from seed_nano.world.records import (
    EDIT_CYCLE,
    KINDS,
    X_ONLY_KINDS,
    record_at,
    scenes_of,
    x_record_at,
)
from seed_nano.world.splits import scene_at


def test_record_at_equals_the_records_of_the_last_training():
    # The shipped weights could not be trained again.
    records = [record_at(kind, 3, index) for kind in KINDS for index in range(20)]
    records += [
        x_record_at(kind, 3, index)
        for kind in ("describe", "questions", "edits", *X_ONLY_KINDS)
        for index in range(20)
    ]
    assert hashlib.sha256(repr(records).encode()).hexdigest()[:16] == "67b51889a279feda"


def test_record_at_with_a_pool():
    # Trainings on few scenes measure what more scenes are worth.
    pool = {scene_at(3, position) for position in range(50)}
    for kind in ("captions", "describe", "draw"):
        assert {scenes_of(record_at(kind, 3, index, pool=50))[0] for index in range(30)} < pool
    # The pool's only scene has nothing to remove: the edit is of another one.
    lone = record_at("edits", 3, EDIT_CYCLE.index("remove"), pool=1)
    assert scene_at(3, 0).layout != "left of"
    assert scenes_of(lone)[0].layout == "left of"
