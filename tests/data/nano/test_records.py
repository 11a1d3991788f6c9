"""Records of every kind: functions of (seed, index), sorts in turn, nothing held out, words that are read back."""

from collections import Counter

import pytest

from seed_multimodal.data.nano.questions import KINDS as QUESTIONS
from seed_multimodal.data.nano.records import EDIT_SORTS, KINDS, from_last_picture, record_at, scenes_of, with_pictures
from seed_multimodal.data.nano.scene import Scene
from seed_multimodal.data.nano.splits import held_out, scene_at
from seed_multimodal.data.nano.words import describe, labels, read_caption
from seed_multimodal.language.tasks import NANO_TASKS


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_is_a_function_of_its_number_and_shows_nothing_held_out(kind: str) -> None:
    for index in range(20):
        record = record_at(kind, 3, index)
        assert record == record_at(kind, 3, index) and scenes_of(record)
        assert not any(map(held_out, scenes_of(record)))
        assert all(held_out(scene) <= {"val"} for scene in scenes_of(record_at(kind, 3, index, "val", pool=8)))
    assert record_at(kind, 3, 0) != record_at(kind, 4, 0)


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
        asked = NANO_TASKS.draw_request(describe(scene))
        assert read_caption(asked.removeprefix("Please draw ")) == labels(scene)
        record = record_at("captions", 0, index)
        assert read_caption(record["text"][0]) == labels(record["image_ids"])
        for text in record["text"]:
            said, true = read_caption(text), labels(record["image_ids"])
            assert said is not None and said.things == true.things and said.counts == true.counts
            assert said.style in (None, true.style) and said.background in (None, true.background)


def test_questions_and_edits_are_of_every_sort_equally_often_and_yes_is_as_frequent_as_no() -> None:
    answers = Counter(from_last_picture(record_at("questions", 1, index))[1]["content"][0].lower().rstrip(".")
                      for index in range(QUESTIONS.index("yesno"), 300 * len(QUESTIONS), len(QUESTIONS)))
    assert set(answers) == {"yes", "no"} and abs(answers["yes"] - 150) < 40
    where = [from_last_picture(record_at("questions", 1, index)) for index in range(5, 60, 6)]
    assert all(turns[0]["content"][1].startswith("Where is the") for turns in where)
    swapped = [record_at("edits", 1, index) for index in range(EDIT_SORTS.index("swap"), 110, len(EDIT_SORTS))]
    for *_, before, after in map(scenes_of, swapped):
        assert after.things == before.things[::-1] and after.jitter == before.jitter


def test_a_picture_is_asked_about_several_times_and_no_question_comes_twice() -> None:
    for index in range(40):
        turns = from_last_picture(record_at("questions", 2, index))
        asked = [[part for part in turn["content"] if isinstance(part, str)][0].split("?")[0] for turn in turns[::2]]
        assert 3 <= len(asked) == len(set(asked)) and sum(text.startswith("Is there") for text in asked) >= 1


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
