"""Nano's world: every function of a scene agrees with the picture, and nothing held out is trained on."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter

import numpy as np
import pytest

from seed_multimodal.errors import ConfigError, DataError
from seed_nano.world import records, splits
from seed_nano.world.__main__ import main
from seed_nano.world.check import check_no_leak, samples
from seed_nano.world.dialogues import Message, conversation, document, in_context, story
from seed_nano.world.edits import EDITS, make_any_edit, make_edit
from seed_nano.world.questions import KINDS, ask, ask_any
from seed_nano.world.records import KINDS as RECORD_KINDS
from seed_nano.world.records import record_at, scenes_of
from seed_nano.world.scene import LAYOUTS, Scene, boxes, render, thing_mask
from seed_nano.world.splits import SPLITS, held_out, scene_at, split_of
from seed_nano.world.sprites import load_sprites
from seed_nano.world.things import BACKGROUNDS, HELD_OUT, NAMES, STYLES, THINGS
from seed_nano.world.words import captions_in, describe, labels, read_caption

EXAMPLES = [scene_at(3, index) for index in range(400)]


def test_every_thing_is_drawn_in_every_style():
    sprites = load_sprites()
    assert set(sprites) == {(style, name) for style in STYLES for name in THINGS}
    assert len(NAMES) == 150 and len(HELD_OUT) == 12
    drawn = {hashlib.sha256(sprite.tobytes()).digest() for sprite in sprites.values()}
    assert len(drawn) == len(sprites)  # no drawing twice
    assert all(max(sprite.size) == 112 for sprite in sprites.values())


def test_a_picture_is_a_function_of_its_scene():
    for scene in EXAMPLES[:20]:
        first, again = render(scene), render(scene)
        assert first.shape == (64, 64, 3) and first.dtype == np.uint8 and np.array_equal(first, again)
    assert render(EXAMPLES[0], 96).shape == (96, 96, 3)


def test_the_boxes_hold_the_drawings():
    for scene in EXAMPLES[:60]:
        mask = thing_mask(scene, 64)
        inside = np.zeros_like(mask, bool)
        for _, (left, top, right, bottom) in boxes(scene):
            assert -0.03 < left < right < 1.03 and -0.03 < top < bottom < 1.03
            rows, columns = ((max(0, int(low * 64) - 1), int(high * 64) + 2)
                             for low, high in ((top, bottom), (left, right)))
            inside[slice(*rows), slice(*columns)] = True
        assert mask[~inside].max(initial=0) < 0.05
        assert 0.02 < mask.mean() < 0.8


def test_words_say_what_is_there():
    for number, scene in enumerate(EXAMPLES):
        assert read_caption(describe(scene)) == labels(scene)
        told = read_caption(describe(scene, random.Random(number)))
        assert told is not None and set(told.things) == set(scene.things)
        for name, value in vars(told).items():
            if name not in ("things", "counts") and value is not None:
                assert value == getattr(scene, name)
        if told.layout is not None:
            assert told.things == scene.things and told.counts == scene.counts
    assert describe(Scene("noto", "blue", "left of", ("tiger", "elephant"))) == (
        "a noto tiger left of an elephant on a blue background")
    assert describe(Scene("fluent", "night", "two kinds", ("fox", "butterfly"), (1, 2))) == (
        "a fluent fox and two butterflies at night")


@pytest.mark.parametrize("words", ["", "hello", "a noto tigger", "a tiger left of", "the tiger", "5 tigers", "a noto"])
def test_other_words_are_no_caption(words):
    assert read_caption(words) is None


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS[1:-1])
def test_records_of_every_kind_in_every_split(split):
    for kind in RECORD_KINDS:
        for index in range(6):  # some sorts of questions and edits cannot be in some splits
            shown = scenes_of(record_at(kind, 0, index, split))
            assert (shown or kind == "talk") and all(held_out(scene) <= {split} for scene in shown)


def test_questions_have_one_exact_answer():
    scene = Scene("noto", "sea", "left of", ("crab", "shark"))
    shake = random.Random(0)
    asked = {kind: [ask(scene, kind, shake) for _ in range(40)] for kind in KINDS}
    answers = {kind: {(one.question, one.answer) for one in found if one} for kind, found in asked.items()}
    assert answers["what"] == {("What is on the left?", "a crab"), ("What is on the right?", "a shark")}
    assert answers["where"] == {("Where is the crab?", "on the left"), ("Where is the shark?", "on the right")}
    assert answers["background"] == {("What is the background?", "the sea")}
    assert {answer for _, answer in answers["count"]} == {"one"}
    yes = Counter(ask(one, "yesno", random.Random(i)).answer for i, one in enumerate(EXAMPLES))
    assert abs(yes["yes"] - yes["no"]) < 80


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_changes_what_it_names_and_nothing_else(kind):
    found = 0
    for number, scene in enumerate(EXAMPLES):
        edit = make_edit(scene, kind, random.Random(number))
        if edit is None:
            continue
        found += 1
        assert edit.target.key != scene.key and edit.target.jitter == scene.jitter
        same = {name for name in ("style", "background") if getattr(scene, name) == getattr(edit.target, name)}
        assert same == {"style", "background"} - {kind}
        if kind in ("add", "remove"):  # the other thing stays where it was, pixel by pixel
            kept = (set(scene.things) & set(edit.target.things)).pop()
            before, after = (dict(boxes(one))[kept] for one in (scene, edit.target))
            assert before == after
            left, top, right, bottom = (round(edge * 64) for edge in before)
            part = slice(max(0, top), bottom), slice(max(0, left), right)
            assert np.array_equal(render(scene)[part], render(edit.target)[part])
    assert found >= 20


def test_longer_samples_refer_back():
    talks = [conversation(random.Random(number)) for number in range(60)]
    assert all([message.role for message in talk] == ["user", "assistant"] * (len(talk) // 2) for talk in talks)
    assert {len(talk) // 2 for talk in talks} == {2, 3, 4, 5, 6}

    def scenes(talk: list[Message]) -> list[Scene]:
        return [part for message in talk for part in message.content if isinstance(part, Scene)]

    back = [talk for talk in talks if "first picture again" in str(talk[-2].content)]
    assert back and all(scenes(talk)[-1].but(background="white").key == scenes(talk)[0].but(background="white").key
                        for talk in back)
    for number in range(60):
        examples, answer = in_context(random.Random(number))
        changed = [{name for name in ("style", "background", "layout", "things", "counts")
                    if getattr(before, name) != getattr(after, name)}
                   for before, after in zip(examples[::2], [examples[1], examples[3], answer], strict=True)]
        assert changed[0] and set.intersection(*changed)
        frames = story(random.Random(number))
        assert len(frames) in (3, 4) and frames[0][1].things[0] in frames[0][0].lower()
        pages = document(random.Random(number))
        assert len({scene.style for _, scene in pages}) == 1


def test_splits_hold_out_what_they_say():
    shares = Counter()
    for index in range(3000):
        shares[split_of(splits.draw_scene(random.Random(index)))] += 1
    assert shares["train"] / 3000 > 0.5 and all(shares[split] > 50 for split in SPLITS[1:-1])
    for split in SPLITS:
        one = scene_at(1, 7, split)
        assert one == scene_at(1, 7, split) and split_of(one) == split
    for name in NAMES:  # a thing is always known in two styles and with most others
        styles = [style for style in STYLES if held_out(Scene(style, "white", "large", (name,))) <= {"val", "places"}]
        assert len(styles) >= 2
        assert sum(held_out(Scene(styles[0], "white", "left of", (name, other))) <= {"val", "places", "styles"}
                   for other in NAMES if other != name) > 100


def test_nothing_held_out_is_trained_on():
    seen = check_no_leak(60)
    assert set(seen) == {"pairs", *RECORD_KINDS} and min(seen.values()) >= 60


@pytest.mark.parametrize(("kind", "leak", "words"), [
    ("edits", scene_at(0, 0, "pairs"), "shows .* held out .pairs"), ("pairs", scene_at(0, 0, "val"), "shows .* .val"),
    ("conversations", scene_at(0, 4, "counts"), "shows .* .counts"), ("stories", scene_at(0, 4, "things"), "shows"),
    ("documents", "Two Peaches.", "says 'Peaches'"),
    ("draw", {"role": "user", "content": ["Please draw a red seal."]}, "says 'seal'")])
def test_a_planted_leak_is_found(kind, leak, words):
    def leaking(seed, index):
        for name, sample in samples(seed, index):
            yield name, [sample, {"content": [leak]}] if name == kind and index == 3 else sample

    with pytest.raises(DataError, match=f"{kind} 3 of seed 0 {words}"):
        check_no_leak(5, make=leaking)


@pytest.mark.parametrize("split", ["val", "pairs", "places", "counts", "styles"])
def test_a_text_that_says_something_held_out_is_found(split):
    scene = next(one for one in (scene_at(0, index, split) for index in range(99)) if one.layout in ("many", "above"))
    with pytest.raises(DataError, match=f"draw 1 of seed 0 says '.*', which is held out .{split}.: Please draw"):
        check_no_leak(2, make=lambda seed, index: iter([("draw", [f"Please draw {describe(scene)}, please."] * index)]))
    assert [said for _, said in captions_in(f"Now, {describe(scene)}. Then the dog.")] == [labels(scene)]


@pytest.mark.parametrize("kind", ["edits", "conversations", "in_context", "stories", "documents", "continued"])
def test_a_maker_that_forgets_what_is_held_out_is_found(kind, monkeypatch):
    monkeypatch.setattr(records, "trainable", lambda scene: True)
    with pytest.raises(DataError, match=f"{kind} .* held out"):
        check_no_leak(60, make=lambda seed, index: iter([(kind, record_at(kind, seed, index))]))


@pytest.mark.parametrize("values", [
    ("emoji", "blue", "large", ("dog",)), ("noto", "purple", "large", ("dog",)), ("noto", "blue", "huge", ("dog",)),
    ("noto", "blue", "large", ("dogs",)), ("noto", "blue", "large", ("dog", "cat")),
    ("noto", "blue", "above", ("dog",)),
    ("noto", "blue", "above", ("dog", "dog")), ("noto", "blue", "many", ("dog",), (1,)),
    ("noto", "blue", "many", ("dog",), (5,)), ("noto", "blue", "two kinds", ("dog", "cat"), (3, 1)),
    ("noto", "blue", "large", ("dog",), (2,)), ("noto", "blue", "many", ("dog",), (2.5,)),
    ("noto", "blue", "large", ("dog",), (True,)), ("noto", "blue", "large", ("dog",), (1,), "7"),
])
def test_impossible_scenes_are_refused(values):
    with pytest.raises(DataError, match="no such scene"):
        Scene(*values)


def test_every_layout_and_background_occurs():
    assert {scene.layout for scene in EXAMPLES} == set(LAYOUTS)
    assert {scene.background for scene in EXAMPLES} == set(BACKGROUNDS)
    assert all(make_any_edit(scene, random.Random(1)) and ask_any(scene, random.Random(1)) for scene in EXAMPLES)


def test_an_unknown_split_kind_or_size_is_refused_at_once():
    with pytest.raises(DataError, match=r"unknown split 'pair' \(did you mean 'pairs'\?\)"):
        scene_at(0, 0, "pair")
    with pytest.raises(DataError, match="unknown split 'test'"):
        record_at("stories", 0, 0, "test")
    with pytest.raises(DataError, match=r"unknown kind of records 'edit' \(did you mean 'edits'\?\)"):
        record_at("edit", 0, 0)
    for size in (0, 10_000):
        with pytest.raises(ConfigError, match=f"{size} pixels a side cannot be drawn"):
            render(EXAMPLES[0], size)


@pytest.mark.parametrize(("arguments", "words"), [
    (["check", "--samples", "0"], "1 or more, not '0'"), (["sheet", "--size", "0"], "1 or more, not '0'"),
    (["sheet", "--out", "sheet.txt"], r"sheet\.txt: its ending names no picture format")])
def test_the_command_refuses_what_it_cannot_do(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        assert main(arguments) == 2
    except SystemExit as refused:  # of the flag itself
        assert refused.code == 2
    assert re.search(words, capsys.readouterr().err) and not list(tmp_path.iterdir())


def test_the_command_checks_and_draws(tmp_path, capsys):
    assert main(["check", "--samples", "20"]) == 0
    assert "Nothing held out is trained on" in capsys.readouterr().out
    assert main(["sheet", "--out", str(tmp_path / "sheet.png"), "--size", "32"]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]
