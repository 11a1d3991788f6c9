"""Records of every kind: functions of (seed, index), sorts in turn, nothing held out, words that are read back."""

from collections import Counter

import pytest

from seed_multimodal.language.tasks import DEFAULT_TASKS, answer_in
from seed_nano.world.records import (
    ASKED,
    EDIT_SORTS,
    KINDS,
    from_last_picture,
    record_at,
    scenes_of,
    with_pictures,
)
from seed_nano.world.scene import Scene
from seed_nano.world.splits import held_out, scene_at
from seed_nano.world.verdicts import VERDICT_END, verdict
from seed_nano.world.words import describe, labels, normalise, read_caption


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_is_a_function_of_its_number_and_shows_nothing_held_out(kind: str) -> None:
    for index in range(20):
        record = record_at(kind, 3, index)
        assert record == record_at(kind, 3, index) and (scenes_of(record) or kind == "talk")
        assert not any(map(held_out, scenes_of(record)))
        assert all(held_out(scene) <= {"val"} for scene in scenes_of(record_at(kind, 3, index, "val", pool=8)))
    assert [record_at(kind, 3, index) for index in range(4)] != [record_at(kind, 4, index) for index in range(4)]

PLACE = ("Where", "On which side")
PRESENCE = ("Is there", "Can you see", "Do you see", "Does the picture")


def test_pictures_of_single_ones_come_from_the_pool() -> None:
    pool = {scene_at(3, number) for number in range(50)}
    for kind in ("captions", "describe", "draw"):
        assert {scenes_of(record_at(kind, 3, index, pool=50))[0] for index in range(30)} < pool
    lone = record_at("edits", 3, EDIT_SORTS.index("remove"), pool=1)  # the pool's only scene has nothing to remove
    assert scene_at(3, 0).layout != "left of" and scenes_of(lone)[0].layout == "left of"


def test_what_is_said_of_a_scene_is_read_back_exactly() -> None:
    for index in range(100):
        (scene, _), (answer,) = (message["content"] for message in from_last_picture(record_at("describe", 0, index)))
        assert answer[0].isupper() and answer.endswith(".") and read_caption(answer) == labels(scene)
        asked = DEFAULT_TASKS.draw_request(describe(scene))
        assert read_caption(asked.removeprefix("Please draw ")) == labels(scene)
        record = record_at("captions", 0, index)
        assert read_caption(record["text"][0]) == labels(record["image_ids"])
        for text in record["text"]:
            said, true = read_caption(text), labels(record["image_ids"])
            assert said is not None and said.things == true.things and said.counts == true.counts
            assert said.style in (None, true.style) and said.background in (None, true.background)


def test_questions_and_edits_are_of_every_sort_equally_often_and_yes_is_as_frequent_as_no() -> None:
    texts = [from_last_picture(record_at("questions", 1, index))[1]["content"][0]
             for index in range(ASKED.index("yesno"), 300 * len(ASKED), len(ASKED))]
    answers = Counter(normalise(answer_in(text, VERDICT_END)) for text in texts)
    assert set(answers) == {"yes", "no"} and abs(answers["yes"] - 150) < 40
    where = [from_last_picture(record_at("questions", 1, index)) for index in range(3, 60, len(ASKED))]
    assert all(turns[0]["content"][1].startswith(PLACE) for turns in where)
    swapped = [record_at("edits", 1, index) for index in range(EDIT_SORTS.index("swap"), 110, len(EDIT_SORTS))]
    for *_, before, after in map(scenes_of, swapped):
        assert after.things == before.things[::-1] and after.jitter == before.jitter


def test_a_picture_is_asked_about_several_times_and_no_question_comes_twice() -> None:
    for index in range(40):
        turns = from_last_picture(record_at("questions", 2, index))
        asked = [[part for part in turn["content"] if isinstance(part, str)][0].split("?")[0] for turn in turns[::2]]
        assert 2 <= len(asked) == len(set(asked)) and any(text.startswith((*PLACE, *PRESENCE)) for text in asked)


def test_a_third_is_said_after_another_picture_was_shown() -> None:
    for kind in ("describe", "questions", "edits"):
        records = [record_at(kind, 4, index) for index in range(120)]
        after = [record for record in records if from_last_picture(record) != record["messages"]]
        assert 25 <= len(after) <= 55
        assert all(isinstance(record["messages"][0]["content"][0], Scene) for record in after)


def test_a_story_is_asked_for_by_its_two_and_told_in_pictures() -> None:
    for index in range(20):
        asked, told = record_at("stories", 0, index)["messages"]
        scenes = scenes_of(told)
        assert 3 <= len(scenes) <= 4 and len(told["content"]) == 2 * len(scenes)
        assert asked["content"][0].startswith("Tell a story about a")
        assert all(name in asked["content"][0] for name in scenes[1].things)


def test_scenes_are_replaced_wherever_they_stand() -> None:
    record = record_at("conversations", 0, 1)
    named = with_pictures(record, describe)
    assert scenes_of(named) == [] and str(named).count(describe(scenes_of(record)[0])) >= 1


def test_verdict_compares_each_thing_until_the_named_one() -> None:
    scene = Scene("noto", "sea", "above", ("shark", "flame"))
    assert verdict(scene, "flame") == "at the top a shark: no, at the bottom a flame: yes"
    assert verdict(scene, "shark") == "at the top a shark: yes"
    assert verdict(scene, "shark", whole=True) == "at the top a shark: yes, at the bottom a flame: no"
    assert verdict(scene, "dog").endswith("a flame: no")


def test_answers_about_a_named_thing_end_a_verdict_about_it() -> None:
    seen = 0
    for index in range(60):
        turns = from_last_picture(record_at("questions", 5, index))
        for asked, answered in zip(turns[::2], turns[1::2], strict=True):
            before, mark, answer = answered["content"][0].partition(VERDICT_END)
            named = asked["content"][-1].startswith((*PLACE, *PRESENCE))
            assert bool(mark) is named or "How many" in asked["content"][-1]
            if named:
                seen += 1
                assert ("yes" in before) is not normalise(answer).startswith(("no", "there is no"))
    assert seen > 60


def test_stories_come_in_the_middle_of_conversations() -> None:
    records = [record_at("conversations", 6, index)["messages"] for index in range(150)]
    told = [messages for messages in records if "Tell a story" in str(messages[-2]["content"])]
    assert len(told) > 8
    assert all(len(messages) > 2 and len(scenes_of({"messages": messages[-1:]})) == 3 for messages in told)
