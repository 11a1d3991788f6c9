"""The record format `nano`."""

import numpy as np
import pytest

from seed_multimodal import open_image
from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.errors import ConfigError, DataError
from seed_nano.world.dialogues import DESCRIBE_REQUESTS
from seed_nano.world.scene import render
from seed_nano.world.source import open_nano
from seed_nano.world.splits import scene_at, scenes
from seed_nano.world.things import NAMES
from seed_nano.world.wide import View
from seed_nano.world.words import describe, parse_caption


def nano(**options):
    return open_pairs({"format": "nano", **options})


def test_open_pairs_of_training_scenes():
    pairs = nano(number=50, seed=3, size=32)
    scene = scene_at(3, 7)
    pair = pairs.read(7)
    assert len(pairs) == 50
    assert np.array_equal(open_image(pair.image).image, render(scene, 32))
    assert pair.key == pairs.key(7) == "scene train 3 7"
    # Four captions in different words of one scene.
    assert len(pair.captions) == 4
    assert {parse_caption(text).things for text in pair.captions} == {scene.things}


def test_open_pairs_of_a_held_out_split():
    # `--data nano` of `seed eval tokenizer`: its scenes do not depend on the number.
    pairs = nano(split="val", size=32, number=50)
    assert (len(pairs), len(nano(split="val")), len(nano())) == (50, 1000, 100_000)
    assert pairs.read(9).captions == [describe(scenes("val")[9])]


def test_requests_to_describe_have_the_fields_of_questions():
    # One reader serves requests and questions.
    source = open_nano(content="describe", number=40)
    records = [source.locate(row).fields for row in range(40)]
    assert all(parse_caption(fields["answer"]) and fields["image"] for fields in records)
    assert {fields["question"] for fields in records} < set(DESCRIBE_REQUESTS)


def test_the_first_things_only_occur():
    # A study's language model sees few of them, in scenes and in records.
    named = set()
    for content in ("", "captions", "draw", "typed_draw", "edits"):
        source = open_nano(content=content, number=60, things=9)
        for row in range(60):
            for value in source.locate(row).fields.values():
                if isinstance(value, View):
                    named |= set(value.scene.things)
    assert named == set(NAMES[:9])


@pytest.mark.parametrize(
    "options, error, name",
    [
        ({"split": "vall"}, DataError, "'val'"),
        ({"files": "nowhere"}, DataError, "nano"),
        ({"numbr": 3}, ConfigError, "'number'"),
        ({"things": 1}, ConfigError, "things"),
        ({"things": 151}, ConfigError, "things"),
        ({"split": "val", "things": 9}, DataError, "things"),
        ({"content": "seed_x.detect", "things": 9}, DataError, "things"),
    ],
)
def test_open_pairs_with_a_wrong_option(options, error, name):
    with pytest.raises(error, match=name):
        nano(**options)
