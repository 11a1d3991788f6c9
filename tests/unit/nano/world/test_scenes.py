"""Every function of a scene agrees with its image."""

import hashlib
import json
import random
from collections import Counter

import numpy as np
import pytest

from seed_multimodal.disk import sha256_of
from seed_multimodal.errors import ConfigError, DataError
from seed_nano.world.dialogues import conversation, document, in_context, story
from seed_nano.world.records import record_at
from seed_nano.world.scene import LAYOUTS, Scene, boxes, find_world, load_sprites, render, thing_mask
from seed_nano.world.splits import HELD_OUT_SPLITS, SPLITS, draw_scene, held_out, scene_at, scenes, split_of
from seed_nano.world.tasks import EDITS, KINDS, ask, ask_any, make_any_edit, make_edit, verdict
from seed_nano.world.things import BACKGROUNDS, HELD_OUT, NAMES, STYLES, THINGS
from seed_nano.world.words import describe, labels, read_caption

EXAMPLES = [scene_at(3, index) for index in range(400)]


def test_load_sprites_has_every_thing_in_every_style():
    sprites = load_sprites()
    assert set(sprites) == {(style, name) for style in STYLES for name in THINGS}
    assert len(NAMES) == 150 and len(HELD_OUT) == 12
    assert len({hashlib.sha256(sprite.tobytes()).digest() for sprite in sprites.values()}) == len(sprites)
    assert all(max(sprite.size) == 112 for sprite in sprites.values())
    for name, entry in json.loads((find_world() / "manifest.json").read_text())["files"].items():
        assert sha256_of(find_world() / name) == entry["sha256"]


@pytest.mark.parametrize("content", [None, b"junk"])
def test_load_sprites_of_a_damaged_shard(content, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    if content:
        (tmp_path / "sprites.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"sprites\.tar: missing or damaged"):
        load_sprites(tmp_path)


def test_render_is_a_function_of_its_scene():
    for scene in EXAMPLES[:20]:
        first, again = render(scene), render(scene)
        assert first.shape == (64, 64, 3) and first.dtype == np.uint8 and np.array_equal(first, again)
    assert render(EXAMPLES[0], 96).shape == (96, 96, 3)
    for size in (0, 10_000):
        with pytest.raises(ConfigError, match=f"{size} pixels a side cannot be drawn"):
            render(EXAMPLES[0], size)


def test_boxes_hold_the_drawings():
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


def test_read_caption_of_describe():
    for number, scene in enumerate(EXAMPLES):
        assert read_caption(describe(scene)) == labels(scene)
        read = read_caption(describe(scene, random.Random(number)))
        assert read is not None and set(read.things) == set(scene.things)
        for name, value in vars(read).items():
            if name not in ("things", "counts") and value is not None:
                assert value == getattr(scene, name)
        if read.layout is not None:
            assert read.things == scene.things and read.counts == scene.counts
    assert describe(Scene("noto", "blue", "left of", ("tiger", "elephant"))) == (
        "a noto tiger left of an elephant on a blue background")
    assert describe(Scene("fluent", "night", "two kinds", ("fox", "butterfly"), (1, 2))) == (
        "a fluent fox and two butterflies at night")


@pytest.mark.parametrize("words", ["", "hello", "a noto tigger", "a tiger left of", "the tiger", "5 tigers", "a noto",
                                   "at night, a tiger in a meadow"])
def test_read_caption_of_other_words(words):
    assert read_caption(words) is None


def test_ask_has_one_exact_answer():
    scene = Scene("noto", "sea", "left of", ("crab", "shark"))
    rng = random.Random(0)
    answers = {kind: {(one.question, one.answer) for _ in range(40) if (one := ask(scene, kind, rng))}
               for kind in KINDS}
    assert answers["what"] == {("What is on the left?", "a crab"), ("What is on the right?", "a shark")}
    assert answers["where"] == {("Where is the crab?", "on the left"), ("Where is the shark?", "on the right")}
    assert answers["background"] == {("What is the background?", "the sea")}
    assert {answer for _, answer in answers["count"]} == {"one"}
    yes = Counter(ask(one, "yesno", random.Random(i)).answer for i, one in enumerate(EXAMPLES))
    assert abs(yes["yes"] - yes["no"]) < 80


def test_verdict_compares_each_thing_until_the_named_one():
    scene = Scene("noto", "sea", "above", ("shark", "flame"))
    assert verdict(scene, "flame") == "at the top a shark: no, at the bottom a flame: yes"
    assert verdict(scene, "shark") == "at the top a shark: yes"
    assert verdict(scene, "shark", whole=True) == "at the top a shark: yes, at the bottom a flame: no"


@pytest.mark.parametrize("kind", EDITS)
def test_make_edit_changes_only_what_it_names(kind):
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


def test_dialogues_refer_back():
    def shown(talk):
        return [part for message in talk for part in message.content if isinstance(part, Scene)]

    talks = [conversation(random.Random(number)) for number in range(60)]
    assert {len(talk) // 2 for talk in talks} == {2, 3, 4, 5, 6}
    back = [talk for talk in talks if "first picture again" in str(talk[-2].content)]
    assert back and all(shown(talk)[-1].but(background="white").key == shown(talk)[0].but(background="white").key
                        for talk in back)
    for number in range(60):
        examples, answer = in_context(random.Random(number))
        changed = [{name for name in ("style", "background", "layout", "things", "counts")
                    if getattr(before, name) != getattr(after, name)}
                   for before, after in zip(examples[::2], [examples[1], examples[3], answer], strict=True)]
        assert changed[0] and set.intersection(*changed)
        frames = story(random.Random(number))
        assert len(frames) in (3, 4) and frames[0][1].things[0] in frames[0][0].lower()
        assert len({scene.style for _, scene in document(random.Random(number))}) == 1


def test_splits_hold_out_their_compositions():
    shares = Counter(split_of(draw_scene(random.Random(index))) for index in range(3000))
    assert shares["train"] / 3000 > 0.5 and all(shares[split] > 50 for split in SPLITS[1:-1])
    for split in SPLITS:
        assert scene_at(1, 7, split) == scene_at(1, 7, split) and split_of(scene_at(1, 7, split)) == split
    for name in NAMES:  # a thing is always known in two styles and with most others
        styles = [style for style in STYLES if held_out(Scene(style, "white", "large", (name,))) <= {"val", "places"}]
        assert len(styles) >= 2
        assert sum(held_out(Scene(styles[0], "white", "left of", (name, other))) <= {"val", "places", "styles"}
                   for other in NAMES if other != name) > 100


@pytest.mark.parametrize("split", HELD_OUT_SPLITS)
def test_scenes_of_a_held_out_split(split):
    listed = scenes(split)
    assert len({scene.key for scene in listed}) == 1000 and {split_of(scene) for scene in listed} == {split}


@pytest.mark.parametrize("values", [
    ("emoji", "blue", "large", ("dog",)), ("noto", "purple", "large", ("dog",)), ("noto", "blue", "huge", ("dog",)),
    ("noto", "blue", "large", ("dogs",)), ("noto", "blue", "large", ("dog", "cat")),
    ("noto", "blue", "above", ("dog",)), ("noto", "blue", "above", ("dog", "dog")),
    ("noto", "blue", "large", ("dog",), (1, 1))])
def test_scene_of_unknown_parts(values):
    with pytest.raises(DataError, match="no such scene"):
        Scene(*values)


def test_scene_at_has_every_layout_and_background():
    assert {scene.layout for scene in EXAMPLES} == set(LAYOUTS)
    assert {scene.background for scene in EXAMPLES} == set(BACKGROUNDS)
    assert all(make_any_edit(scene, random.Random(1)) and ask_any(scene, random.Random(1)) for scene in EXAMPLES)


def test_an_unknown_split_or_kind_is_named_with_the_nearest():
    for make in (lambda: scene_at(0, 0, "pair"), lambda: scenes("pair"), lambda: record_at("stories", 0, 0, "pair")):
        with pytest.raises(DataError, match=r"unknown split 'pair' \(did you mean 'pairs'\?\)"):
            make()
    with pytest.raises(DataError, match=r"unknown kind of records 'edit' \(did you mean 'edits'\?\)"):
        record_at("edit", 0, 0)
