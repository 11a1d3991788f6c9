"""Scenes: images, boxes, captions, questions, edits, splits."""

import random
from collections import Counter

import numpy as np
import pytest

from seed_multimodal.errors import DataError
from seed_nano.world.scene import Scene, boxes, load_sprites, render, thing_mask
from seed_nano.world.splits import (
    HELD_OUT_SPLITS,
    SPLITS,
    draw_scene,
    held_out,
    scene_at,
    scenes,
    split_of,
)
from seed_nano.world.tasks import EDITS, KINDS, ask, make_edit
from seed_nano.world.things import HELD_OUT, NAMES, STYLES, THINGS
from seed_nano.world.words import Labels, describe, parse_caption

EXAMPLES = [scene_at(3, index) for index in range(400)]


def test_load_sprites_contains_every_thing_in_every_style():
    sprites = load_sprites()
    assert set(sprites) == {(style, name) for style in STYLES for name in THINGS}
    assert len(NAMES) == 150 and len(HELD_OUT) == 12


def test_render_at_a_size():
    assert render(EXAMPLES[0]).shape == (64, 64, 3) and render(EXAMPLES[0], 96).shape == (96, 96, 3)


def test_boxes_enclose_the_things():
    for scene in EXAMPLES[:60]:
        mask = thing_mask(scene, 64)
        inside = np.zeros_like(mask, bool)
        for _, (left, top, right, bottom) in boxes(scene):
            assert -0.03 < left < right < 1.03 and -0.03 < top < bottom < 1.03
            rows, columns = (
                (max(0, int(low * 64) - 1), int(high * 64) + 2)
                for low, high in ((top, bottom), (left, right))
            )
            inside[slice(*rows), slice(*columns)] = True
        assert mask[~inside].max(initial=0) < 0.05
        assert 0.02 < mask.mean() < 0.8


def test_parse_caption_of_describe():
    for index, scene in enumerate(EXAMPLES):
        assert parse_caption(describe(scene)) == Labels(*scene.key)
        read = parse_caption(describe(scene, random.Random(index)))
        assert read is not None and set(read.things) == set(scene.things)
        assert read.style in (None, scene.style) and read.background in (None, scene.background)
        if read.layout is not None:
            assert read.things == scene.things and read.counts == scene.counts
    assert describe(Scene("noto", "blue", "left of", ("tiger", "elephant"))) == (
        "a noto tiger left of an elephant on a blue background"
    )
    assert describe(Scene("fluent", "night", "two kinds", ("fox", "butterfly"), (1, 2))) == (
        "a fluent fox and two butterflies at night"
    )


@pytest.mark.parametrize(
    "words", ["", "a noto tigger", "a tiger left of", "5 tigers", "at night, a tiger in a meadow"]
)
def test_parse_caption_of_other_words(words):
    assert parse_caption(words) is None


def test_ask_has_one_exact_answer():
    scene = Scene("noto", "sea", "left of", ("crab", "shark"))
    rng = random.Random(0)
    answers = {
        kind: {
            (question.question, question.answer)
            for _ in range(40)
            if (question := ask(scene, kind, rng))
        }
        for kind in KINDS
    }
    assert answers["what"] == {
        ("What is on the left?", "a crab"),
        ("What is on the right?", "a shark"),
    }
    assert answers["where"] == {
        ("Where is the crab?", "on the left"),
        ("Where is the shark?", "on the right"),
    }
    assert answers["background"] == {("What is the background?", "the sea")}


@pytest.mark.parametrize("kind", EDITS)
def test_make_edit_changes_one_property(kind):
    edits = 0
    for index, scene in enumerate(EXAMPLES):
        edit = make_edit(scene, kind, random.Random(index))
        if edit is None:
            continue
        edits += 1
        assert edit.target.key != scene.key and edit.target.jitter == scene.jitter
        same = {
            name
            for name in ("style", "background")
            if getattr(scene, name) == getattr(edit.target, name)
        }
        assert same == {"style", "background"} - {kind}
        if kind in ("add", "remove"):  # the other thing is not moved
            other = (set(scene.things) & set(edit.target.things)).pop()
            assert dict(boxes(scene))[other] == dict(boxes(edit.target))[other]
    assert edits >= 20


def test_split_of_scenes():
    shares = Counter(split_of(draw_scene(random.Random(index))) for index in range(3000))
    assert shares["train"] / 3000 > 0.5 and all(shares[split] > 50 for split in SPLITS[1:-1])
    for split in SPLITS:
        assert (
            scene_at(1, 7, split) == scene_at(1, 7, split)
            and split_of(scene_at(1, 7, split)) == split
        )
    for name in NAMES:  # each thing is trained in two styles and with most others
        styles = [
            style
            for style in STYLES
            if held_out(Scene(style, "white", "large", (name,))) <= {"val", "places"}
        ]
        assert len(styles) >= 2
        assert (
            sum(
                held_out(Scene(styles[0], "white", "left of", (name, other)))
                <= {"val", "places", "styles"}
                for other in NAMES
                if other != name
            )
            > 100
        )


@pytest.mark.parametrize("split", HELD_OUT_SPLITS)
def test_scenes_of_a_held_out_split(split):
    listed = scenes(split)
    assert len({scene.key for scene in listed}) == 1000 and {
        split_of(scene) for scene in listed
    } == {split}


def test_scenes_of_an_unknown_split():
    with pytest.raises(DataError, match=r"unknown split 'pair' \(did you mean 'pairs'\?\)"):
        scenes("pair")
