"""Records of every kind: functions of (seed, index) with sorts in turn and nothing held out."""

import hashlib
from collections import Counter

import pytest

from seed_multimodal.language.prompts import without_verdict
from seed_nano.world.dialogues import UNKNOWN
from seed_nano.world.records import (
    EDIT_CYCLE,
    KINDS,
    QUESTION_CYCLE,
    X_ONLY_KINDS,
    from_last_image,
    record_at,
    scenes_of,
    x_record_at,
)
from seed_nano.world.splits import SPLITS, held_out, scene_at
from seed_nano.world.tasks import VERDICT_END
from seed_nano.world.things import VOCABULARY
from seed_nano.world.words import normalise

NAMING = ("Where", "On which side", "Is there", "Can you see", "Do you see", "Does the picture")


def test_record_at_equals_the_records_of_the_last_training():
    records = [record_at(kind, 3, index) for kind in KINDS for index in range(20)]
    records += [
        x_record_at(kind, 3, index)
        for kind in ("describe", "questions", "edits", *X_ONLY_KINDS)
        for index in range(20)
    ]
    assert hashlib.sha256(repr(records).encode()).hexdigest()[:16] == "066c3f583c30b7fb"


def test_small_talk_never_comes_with_an_image():
    small_talk = {request for talk in VOCABULARY["small_talk"] for request in talk["asked"]}
    for kind in ("asides", "talk", "describe"):
        for index in range(100):
            for message in record_at(kind, 2, index)["messages"][::2]:
                assert len(message["content"]) == 1 or message["content"][-1] not in small_talk
    answers = {record_at("asides", 2, index)["messages"][1]["content"][0] for index in range(20)}
    assert answers == {UNKNOWN}


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS[1:-1])
def test_record_at_in_every_split(split):
    for kind in KINDS:
        for index in range(6):  # some splits lack some sorts of questions and edits
            scenes = scenes_of(record_at(kind, 0, index, split))
            assert (scenes or kind == "talk") and all(
                held_out(scene) <= {split} for scene in scenes
            )


def test_record_at_with_a_pool():
    pool = {scene_at(3, position) for position in range(50)}
    for kind in ("captions", "describe", "draw"):
        assert {scenes_of(record_at(kind, 3, index, pool=50))[0] for index in range(30)} < pool
    lone = record_at(
        "edits", 3, EDIT_CYCLE.index("remove"), pool=1
    )  # the pool's only scene has nothing to remove
    assert scene_at(3, 0).layout != "left of" and scenes_of(lone)[0].layout == "left of"


def test_record_at_alternates_sorts_of_questions_and_edits():
    texts = [
        from_last_image(record_at("questions", 1, index))[1]["content"][0]
        for index in range(
            QUESTION_CYCLE.index("yesno"), 300 * len(QUESTION_CYCLE), len(QUESTION_CYCLE)
        )
    ]
    answers = Counter(normalise(without_verdict(text, VERDICT_END)) for text in texts)
    assert set(answers) == {"yes", "no"} and abs(answers["yes"] - 150) < 40
    positions = [
        from_last_image(record_at("questions", 1, index))
        for index in range(3, 60, len(QUESTION_CYCLE))
    ]
    assert all(turns[0]["content"][1].startswith(("Where", "On which side")) for turns in positions)
    swapped = [
        record_at("edits", 1, index)
        for index in range(EDIT_CYCLE.index("swap"), 110, len(EDIT_CYCLE))
    ]
    for *_, before, after in map(scenes_of, swapped):
        assert after.things == before.things[::-1] and after.jitter == before.jitter


def test_answers_about_a_named_thing_start_with_a_verdict():
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
