"""Records of every kind: functions of (seed, index), sorts in turn, nothing held out, words that are read back."""

from collections import Counter

import pytest

from seed_multimodal.language.tasks import DEFAULT_TASKS, answer_in
from seed_nano.world.records import ASKED, EDIT_SORTS, KINDS, from_last_picture, record_at, scenes_of, with_pictures
from seed_nano.world.scene import Scene
from seed_nano.world.splits import SPLITS, held_out, scene_at
from seed_nano.world.tasks import VERDICT_END
from seed_nano.world.words import describe, labels, normalise, read_caption


@pytest.mark.parametrize("kind", KINDS)
def test_record_at_is_a_function_of_its_number(kind: str) -> None:
    for index in range(10):
        assert record_at(kind, 3, index) == record_at(kind, 3, index)
        assert all(held_out(scene) <= {"val"} for scene in scenes_of(record_at(kind, 3, index, "val", pool=8)))
    assert [record_at(kind, 3, index) for index in range(4)] != [record_at(kind, 4, index) for index in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS[1:-1])
def test_record_at_in_every_split(split: str) -> None:
    for kind in KINDS:
        for index in range(6):  # some sorts of questions and edits cannot be in some splits
            shown = scenes_of(record_at(kind, 0, index, split))
            assert (shown or kind == "talk") and all(held_out(scene) <= {split} for scene in shown)


PLACE = ("Where", "On which side")
PRESENCE = ("Is there", "Can you see", "Do you see", "Does the picture")


def test_record_at_with_a_pool() -> None:
    pool = {scene_at(3, number) for number in range(50)}
    for kind in ("captions", "describe", "draw"):
        assert {scenes_of(record_at(kind, 3, index, pool=50))[0] for index in range(30)} < pool
    lone = record_at("edits", 3, EDIT_SORTS.index("remove"), pool=1)  # the pool's only scene has nothing to remove
    assert scene_at(3, 0).layout != "left of" and scenes_of(lone)[0].layout == "left of"


def test_read_caption_of_records() -> None:
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


def test_questions_and_edits_take_their_sorts_in_turn() -> None:
    texts = [from_last_picture(record_at("questions", 1, index))[1]["content"][0]
             for index in range(ASKED.index("yesno"), 300 * len(ASKED), len(ASKED))]
    answers = Counter(normalise(answer_in(text, VERDICT_END)) for text in texts)
    assert set(answers) == {"yes", "no"} and abs(answers["yes"] - 150) < 40
    where = [from_last_picture(record_at("questions", 1, index)) for index in range(3, 60, len(ASKED))]
    assert all(turns[0]["content"][1].startswith(PLACE) for turns in where)
    swapped = [record_at("edits", 1, index) for index in range(EDIT_SORTS.index("swap"), 110, len(EDIT_SORTS))]
    for *_, before, after in map(scenes_of, swapped):
        assert after.things == before.things[::-1] and after.jitter == before.jitter


def test_questions_of_an_image_differ() -> None:
    for index in range(40):
        turns = from_last_picture(record_at("questions", 2, index))
        asked = [[part for part in turn["content"] if isinstance(part, str)][0].split("?")[0] for turn in turns[::2]]
        assert 2 <= len(asked) == len(set(asked)) and any(text.startswith((*PLACE, *PRESENCE)) for text in asked)


def test_a_third_of_the_records_shows_another_image_first() -> None:
    for kind in ("describe", "questions", "edits"):
        records = [record_at(kind, 4, index) for index in range(120)]
        after = [record for record in records if from_last_picture(record) != record["messages"]]
        assert 25 <= len(after) <= 55
        assert all(isinstance(record["messages"][0]["content"][0], Scene) for record in after)


def test_with_pictures_replaces_every_scene() -> None:
    record = record_at("conversations", 0, 1)
    named = with_pictures(record, describe)
    assert scenes_of(named) == [] and str(named).count(describe(scenes_of(record)[0])) >= 1


def test_answers_about_a_named_thing_follow_a_verdict() -> None:
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


def test_conversations_with_a_story() -> None:
    records = [record_at("conversations", 6, index)["messages"] for index in range(150)]
    told = [messages for messages in records if "Tell a story" in str(messages[-2]["content"])]
    assert len(told) > 8
    assert all(len(messages) > 2 and len(scenes_of({"messages": messages[-1:]})) == 3 for messages in told)
