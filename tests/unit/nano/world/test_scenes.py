"""Scenes: images, boxes, captions, splits (questions and edits: their records, test_leaks.py)."""

import random
from collections import Counter

import numpy as np
import pytest

from seed_multimodal.errors import DataError
from seed_nano.world.scene import Scene, boxes, render, render_with_mask, thing_mask
from seed_nano.world.splits import (
    HELD_OUT_SPLITS,
    SPLITS,
    draw_scene,
    scene_at,
    scenes,
    split_of,
)
from seed_nano.world.words import Labels, describe, parse_caption

EXAMPLES = [scene_at(3, index) for index in range(400)]


def test_boxes_enclose_the_things():
    # Boxes are the truth of detection.
    for scene in EXAMPLES[:60]:
        mask = thing_mask(scene, 64)
        inside = np.zeros_like(mask, bool)
        for _, (left, top, right, bottom) in boxes(scene):
            assert -0.03 < left < right < 1.03 and -0.03 < top < bottom < 1.03
            rows, columns = (
                slice(max(0, int(low * 64) - 1), int(high * 64) + 2)
                for low, high in ((top, bottom), (left, right))
            )
            inside[rows, columns] = True
        assert mask[~inside].max(initial=0) < 0.05
        assert 0.02 < mask.mean() < 0.8


@pytest.mark.parametrize("size", [16, 64, 160])
def test_render_with_mask_is_both_at_once(size):
    for scene in EXAMPLES[:40]:
        pixels, mask = render_with_mask(scene, size)
        assert np.array_equal(pixels, render(scene, size))
        assert np.array_equal(mask, thing_mask(scene, size))


def test_parse_caption_of_describe():
    # Captions are scored by what is parsed from them.
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
    # Other sentences are no captions, not wrong ones.
    assert parse_caption(words) is None


def test_split_of_scenes():
    # Reports of a split are about enough scenes, and most are for training.
    shares = Counter(split_of(draw_scene(random.Random(index))) for index in range(3000))
    assert shares["train"] > 1500
    assert all(shares[split] > 50 for split in SPLITS[1:-1])


@pytest.mark.parametrize("split", HELD_OUT_SPLITS)
def test_scenes_of_a_held_out_split(split):
    # The scenes of the published reports.
    listed = scenes(split)
    assert len({scene.key for scene in listed}) == 1000
    assert {split_of(scene) for scene in listed} == {split}
    assert scene_at(1, 7, split) == scene_at(1, 7, split)
    assert split_of(scene_at(1, 7, split)) == split


def test_scenes_of_an_unknown_split():
    with pytest.raises(DataError, match="'pairs'"):
        scenes("pair")
