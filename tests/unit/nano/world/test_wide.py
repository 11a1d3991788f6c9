"""Wide scenes, views and the records of nano-x: nothing held out, exact boxes."""

import pytest

from seed_multimodal.errors import DataError
from seed_nano.world.records import X_ONLY_KINDS
from seed_nano.world.scene import QUARTERS, Scene, boxes, render, render_slots
from seed_nano.world.source import open_nano
from seed_nano.world.splits import held_out
from seed_nano.world.wide import WIDE_SPLITS, View, describe_wide, held_out_wide, wide_at


def test_render_and_describe_wide_scenes():
    # Each thing is in the quarter that the caption names, and nowhere else.
    for index in range(40):
        scene = wide_at(0, index)
        empty = render_slots(scene.style, scene.background, [], 128)
        image = render(scene, 128).copy()
        for name, (left, top, right, bottom) in boxes(scene):
            quarter = scene.things.index(name)
            assert left + right > 1 or quarter % 2 == 0
            assert top + bottom > 1 or quarter // 2 == 0
            rows, columns = (
                slice(round(low * 128), round(high * 128))
                for low, high in ((top, bottom), (left, right))
            )
            inside = (rows, columns)
            assert (image[inside] != empty[inside]).any()
            image[inside] = empty[inside]
        assert (image != empty).any(2).mean() < 0.02  # outlines at the boxes' edges
        for name, quarter in zip(scene.things, QUARTERS, strict=True):
            assert not name or f"{name} at the {quarter}," in describe_wide(scene)


def test_wide_at_contains_nothing_held_out():
    # The report of unseen pairs would be of seen ones.
    assert not any(held_out_wide(wide_at(3, index)) for index in range(300))
    for split in WIDE_SPLITS[2:]:
        assert all(held_out_wide(wide_at(3, index, split)) == {split} for index in range(20))
    with pytest.raises(DataError, match="'counts'"):
        wide_at(3, 0, "counts")


def test_view_crops_and_adds_margins():
    # Boxes move with the image.
    scene = Scene("noto", "sea", "left", ("crab",))
    plain = View(scene, 100)
    framed = View(scene, 100, (-0.5, 0.1, 1.5, 1.0), 7)
    assert plain().shape == (100, 100, 3) and framed().shape == (90, 200, 3)
    assert (framed()[:, :50] == 7).all() and (framed()[:, 50:150] == plain()[10:]).all()
    [(_, (left, top, right, bottom))] = plain.boxes()
    [(_, moved)] = framed.boxes()
    expected = ((left + 0.5) / 2, (top - 0.1) / 0.9, (right + 0.5) / 2, (bottom - 0.1) / 0.9)
    assert moved == pytest.approx(expected)


@pytest.mark.parametrize(
    "kind", ["describe", "questions", "draw", "edits", "conversations", *X_ONLY_KINDS]
)
def test_x_record_at_contains_nothing_held_out(kind):
    shapes = set()
    for index in range(30):
        fields = open_nano(content=f"seed_x.{kind}").locate(index).fields
        parts = [part for message in fields["messages"] for part in message["content"]]
        shapes |= {part["image"]().shape for part in parts if not isinstance(part, str)}
        scenes = [part["image"].scene for part in parts if not isinstance(part, str)]
        assert not any(isinstance(scene, Scene) and held_out(scene) for scene in scenes)
        assert not any(isinstance(part, str) and "Please draw" in part for part in parts)
    assert len(shapes) == 1 if kind == "draw" else len(shapes) > 4
