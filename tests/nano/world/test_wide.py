"""Wide scenes and the records of nano-x: nothing held out, exact boxes, words that are read back."""

import random
from collections import defaultdict

import numpy as np
import pytest

from seed_multimodal.errors import DataError
from seed_multimodal.language.seed_x import read_boxes
from seed_multimodal.language.tasks import SEED_X_TASKS
from seed_nano.world.requests import DESCRIBE_REQUESTS
from seed_nano.world.scene import Scene, paint
from seed_nano.world.source import NanoContent
from seed_nano.world.splits import held_compositions, held_out
from seed_nano.world.talk import ANSWERS
from seed_nano.world.things import THINGS
from seed_nano.world.verdicts import VERDICT_END
from seed_nano.world.view import View
from seed_nano.world.wide import (
    QUARTERS,
    WideScene,
    ask_wide,
    describe_wide,
    held_wide,
    read_wide,
    render_wide,
    wide_at,
    wide_boxes,
)
from seed_nano.world.x_records import GRID, OWN, box_text, x_record_at


def test_wide_scenes_of_train_show_nothing_that_is_held_out() -> None:
    for number in range(300):
        scene = wide_at(3, number)
        there = scene.there
        pairs = [(one, other) for one in there for other in there if one < other]
        assert not any(held_compositions(pair, (1, 1), scene.style, scene.background) for pair in pairs)
    assert all(held_wide(wide_at(3, number, "pairs")) == {"pairs"} for number in range(20))


def test_things_are_where_boxes_and_words_say() -> None:
    for number in range(40):
        scene = wide_at(0, number)
        empty = paint(scene.style, scene.background, [], 128)
        picture = render_wide(scene).copy()
        assert picture.shape == (128, 128, 3)
        for name, (left, top, right, bottom) in wide_boxes(scene):
            quarter = scene.things.index(name)
            assert (left + right > 1, top + bottom > 1) == (bool(quarter % 2), bool(quarter // 2))
            inside = np.s_[round(top * 128):round(bottom * 128), round(left * 128):round(right * 128)]
            assert (picture[inside] != empty[inside]).any()
            picture[inside] = empty[inside]
        assert (picture != empty).any(2).mean() < 0.02  # outlines at the boxes' edges
        said = read_wide(describe_wide(scene))
        assert said == {quarter: name for quarter, name in zip(QUARTERS, scene.things, strict=True) if name}


def test_an_answer_that_goes_on_and_on_is_read_at_once() -> None:
    assert read_wide("a " + "tiger tiger " * 200) == {}  # words that may be cut at any blank took hours


def test_questions_have_one_answer() -> None:
    scene = WideScene("noto", "sea", ("", "tiger", "", "owl"))
    found = {ask_wide(scene, random.Random(seed)) for seed in range(60)}
    assert found == {("What is at the top left?", "nothing"), ("What is at the bottom left?", "nothing"),
                     ("What is at the top right?", "a tiger"), ("What is at the bottom right?", "an owl"),
                     ("Where is the tiger?", "at the top right"), ("Where is the owl?", "at the bottom right")}


@pytest.mark.parametrize("things", [("", "", "", ""), ("tiger", "tiger", "", ""), ("nobody", "", "", "")])
def test_no_such_wide_scene(things: tuple[str, str, str, str]) -> None:
    with pytest.raises(DataError, match="no such wide scene"):
        WideScene("noto", "sea", things)


def test_boxes_of_a_record_are_those_of_its_scene() -> None:
    there = not_there = 0
    for number in range(60):
        messages = x_record_at("detect", 0, number)["messages"]
        view = messages[0]["content"][0]
        for asked, answered in zip(messages[::2], messages[1::2], strict=True):
            before, _, answer = answered["content"][0].partition(VERDICT_END)
            found, problems = read_boxes(answer, grid=GRID)
            request = asked["content"][-1]
            wanted = [box for one, box in view.boxes()
                      if f"the {one}?" in request or f"the {THINGS[one].plural}?" in request]
            assert not problems and len(found) == len(wanted) and ("yes" in before) is bool(wanted), request
            assert wanted or answer.startswith("there is no ")
            there, not_there = there + bool(wanted), not_there + (not wanted)
            for box in found:
                near = [max(abs(box.x / GRID - (one[0] + one[2]) / 2), abs(box.width / GRID - (one[2] - one[0])))
                        for one in wanted]
                assert min(near) <= 0.51 / GRID + 0.01
    assert there > 80 and not_there == 60


def test_view_crops_and_adds_margins_with_the_boxes() -> None:
    scene = Scene("noto", "sea", "left", ("crab",))
    plain, wide = View(scene, 100), View(scene, 100, (-0.5, 0.1, 1.5, 1.0), 7)
    assert plain.pixels().shape == (100, 100, 3) and wide.pixels().shape == (90, 200, 3)
    assert (wide.pixels()[:, :50] == 7).all() and (wide.pixels()[:, 50:150] == plain.pixels()[10:]).all()
    (_, one), (_, other) = plain.boxes()[0], wide.boxes()[0]
    assert other == pytest.approx(((one[0] + 0.5) / 2, (one[1] - 0.1) / 0.9, (one[2] + 0.5) / 2, (one[3] - 0.1) / 0.9))


def test_records_show_nothing_held_out_and_ask_as_seed_x_does() -> None:
    shapes: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for kind in ("describe", "questions", "draw", "edits", "conversations", *OWN):
        for number in range(30):
            record = NanoContent(None, f"seed_x.{kind}").locate(number)
            assert [message["role"] for message in record.fields["messages"]][:2] == ["user", "assistant"]
            parts = [part for message in record.fields["messages"] for part in message["content"]]
            drawn = [part["image"]().shape for part in parts if not isinstance(part, str)]
            assert drawn and all(57 <= side <= 600 for shape in drawn for side in shape[:2]), kind
            shapes[kind] |= set(drawn)
            for message in x_record_at(kind, 0, number)["messages"]:
                for part in message["content"]:
                    scene = part.scene if isinstance(part, View) else part
                    assert not (isinstance(scene, Scene) and held_out(scene))
                    assert not (isinstance(part, str) and "Please draw" in part)
    assert all(len(shapes[kind]) > 5 for kind in ("describe", "questions", "edits", *OWN)) and len(shapes["draw"]) == 1
    with pytest.raises(DataError, match="did you mean 'detect'"):
        x_record_at("detekt", 0, 0)


def test_an_answer_has_one_form_whatever_was_asked_before() -> None:
    described = answered = 0
    for kind in ("describe", "questions", "edits", "conversations", "wide_describe", "wide_questions"):
        for number in range(60):
            messages = x_record_at(kind, 0, number)["messages"]
            for user, assistant in zip(messages[::2], messages[1::2], strict=True):
                text = assistant["content"][0]
                if len(assistant["content"]) > 1 or not isinstance(text, str):
                    continue
                sentence = user["content"][-1] in (SEED_X_TASKS.describe, *DESCRIBE_REQUESTS)
                if text in ANSWERS:
                    continue
                assert (text[0].isupper() and text.endswith(".")) is sentence, (user, text)
                described, answered = described + sentence, answered + (not sentence)
    assert described > 100 and answered > 200


def test_a_box_at_the_edge_stays_inside() -> None:
    said = box_text("dog", [("dog", (-0.001, 0.0, 0.5, 1.001)), ("cat", (0.5, 0.0, 1.0, 1.0))])
    box, = read_boxes(said, grid=GRID)[0]
    assert (box.x, box.y, box.width, box.height) == (16, 32, 32, 63)
