"""Training samples of every kind are functions of (seed, index), and contain no held-out scenes or
texts."""

import hashlib
import re
from collections.abc import Iterator

import pytest

from seed_nano.world.records import (
    EDIT_CYCLE,
    KINDS,
    X_ONLY_KINDS,
    record_at,
    scenes_of,
    texts_of,
    x_record_at,
)
from seed_nano.world.scene import Scene
from seed_nano.world.source import open_nano
from seed_nano.world.splits import held_out, held_out_compositions, scene_at
from seed_nano.world.things import HELD_OUT, plural
from seed_nano.world.words import describe, normalise, parse_caption

UNNAMED = re.compile(
    rf"\b(?:{'|'.join(form for name in HELD_OUT for form in (plural(name), name))})\b", re.I
)
START = re.compile(r"\b(?:an?|two|three|four|in|on|at|under|against|indoors|inside)\b")


def captions_in(text) -> Iterator[str]:
    """The longest caption at each position of a text."""
    text = normalise(text)
    for start in START.finditer(text):
        window = text[start.start() : start.start() + 120]
        ends = [match.start() for match in re.finditer(r"(?=[ ,.?!]|$)", window)]
        parts = (window[:end] for end in reversed(ends) if end)
        yield from [part for part in parts if parse_caption(part)][:1]


def leaks(sample) -> list[tuple[str, set[str]]]:
    """Held-out captions and words of a sample, with their splits."""
    leaked = [(describe(scene), set(held_out(scene))) for scene in scenes_of(sample)]
    for text in texts_of(sample):
        leaked += [(name[0], {"things"}) for name in UNNAMED.finditer(text)]
        for caption in captions_in(text):
            labels = parse_caption(caption)
            labels_of_splits = (labels.things, labels.counts, labels.style, labels.background)
            leaked_splits = held_out_compositions(*labels_of_splits)
            if labels.style and labels.background and labels.layout:
                place = (labels.style, labels.background, labels.layout)
                leaked_splits |= held_out(Scene(*place, labels.things, labels.counts))
            leaked.append((caption, leaked_splits))
    return [(sentence, splits) for sentence, splits in leaked if splits]


@pytest.mark.parametrize("kind", KINDS)
def test_record_at_contains_nothing_held_out(kind):
    # The report of unseen compositions would be of seen ones.
    for index in range(60):
        for record in (record_at(kind, 0, index), record_at(kind, 0, index, pool=1000)):
            assert leaks(record) == [] and (scenes_of(record) or kind in ("talk", "requests"))


def test_open_nano_contains_nothing_held_out():
    for fields in (open_nano().locate(index).fields for index in range(60)):
        assert leaks({"image": fields["image"].scene, "caption": fields["caption"]}) == []


@pytest.mark.parametrize("split", ["val", "pairs", "places", "counts", "styles"])
def test_leaks_finds_a_scene_and_a_text(split):
    # Without it, the tests above could not fail.
    drawn = (scene_at(0, index, split) for index in range(99))
    scene = next(scene for scene in drawn if scene.layout in ("many", "above"))
    caption = (describe(scene), {split})
    assert leaks({"messages": [{"role": "user", "content": [scene]}]}) == [caption]
    assert caption in leaks([f"Please draw {describe(scene)}, please. Then the dog."])


def test_record_at_equals_the_records_of_the_last_training():
    # The shipped weights could not be trained again.
    records = [record_at(kind, 3, index) for kind in KINDS for index in range(20)]
    records += [
        x_record_at(kind, 3, index)
        for kind in ("describe", "questions", "edits", *X_ONLY_KINDS)
        for index in range(20)
    ]
    assert hashlib.sha256(repr(records).encode()).hexdigest()[:16] == "7c9aaeeb8b0cdc00"


def test_record_at_with_a_pool():
    # Trainings on few scenes measure what more scenes are worth.
    pool = {scene_at(3, position) for position in range(50)}
    for kind in ("captions", "describe", "draw"):
        assert {scenes_of(record_at(kind, 3, index, pool=50))[0] for index in range(30)} < pool
    # The pool's only scene has nothing to remove: the edit is of another one.
    lone = record_at("edits", 3, EDIT_CYCLE.index("remove"), pool=1)
    assert scene_at(3, 0).layout != "left of"
    assert scenes_of(lone)[0].layout == "left of"
