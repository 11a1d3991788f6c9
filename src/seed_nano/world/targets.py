"""A scene's labels as class numbers: what the vision encoder is trained on, what probes and the
judge predict.

    label_ids(scene)    # {"first": 3, "second": 150, "style": 0, "background": 6, "layout": 4}

`first` is the thing at the left or above (or the only one), `second` the other one; `layout`
includes the counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seed_nano.world.scene import LAYOUTS, Scene, anchors
from seed_nano.world.things import BACKGROUNDS, HELD_OUT, NAMES, STYLES
from seed_nano.world.words import Labels

COUNTS = {"many": ((2,), (3,), (4,)), "two kinds": ((1, 2), (2, 1), (2, 2))}
"""Numbers of things in the layouts with more than one of a kind."""
ARRANGEMENTS: dict[str, tuple[str, tuple[int, ...]]] = {}
"""Classes of the label `layout` -> a scene's layout and counts."""
for _layout in LAYOUTS:
    for _counts in COUNTS.get(_layout, ((),)):
        ARRANGEMENTS[" ".join([_layout, *map(str, _counts)])] = _layout, _counts
NOTHING = "nothing"  # the second thing of a scene with one kind
IGNORED = -100  # class number of a thing that is not among the classes; cross entropy leaves it out

CLASSES: dict[str, tuple[str, ...]] = {
    "first": NAMES,
    "second": (*NAMES, NOTHING),
    "style": STYLES,
    "background": BACKGROUNDS,
    "layout": tuple(ARRANGEMENTS),
}
"""Label -> its classes, as the vision encoder learns them."""

JUDGE_CLASSES: dict[str, tuple[str, ...]] = {
    **CLASSES,
    "first": NAMES + HELD_OUT,
    "second": (*NAMES, *HELD_OUT, NOTHING),
}
"""The same with the things that are held out."""


def arrangement_anchors() -> list[list[tuple[int, float, float, float]]]:
    """`anchors` of each of `ARRANGEMENTS`."""
    return [anchors(layout, counts) for layout, counts in ARRANGEMENTS.values()]


def scene_anchors(scenes: Sequence[Scene]) -> Tensor:
    """Drawings of each scene, jitter included, as rows of `arrangement_anchors`: float32 [N, K, 4].

    Scenes with fewer than K drawings are padded with rows that begin with -1.
    """
    max_slots = max(map(len, arrangement_anchors()))
    padding = [-1, 0.5, 0.5, 1.0]
    rows = []
    for scene in scenes:
        row = [
            [scene.things.index(slot.thing), slot.x, slot.y, slot.side] for slot in scene.slots()
        ]
        rows.append(row + [padding] * (max_slots - len(row)))
    return torch.tensor(rows)


def label_names(scene: Scene | Labels) -> dict[str, str | None]:
    """The class of every label, in the order of `CLASSES`; None: a caption does not say it."""
    layout = scene.layout
    if layout in COUNTS:
        layout = " ".join([layout, *map(str, scene.counts)])
    return {
        "first": scene.things[0],
        "second": scene.things[1] if len(scene.things) == 2 else NOTHING,
        "style": scene.style,
        "background": scene.background,
        "layout": layout,
    }


def label_ids(scene: Scene, classes: dict[str, tuple[str, ...]] = CLASSES) -> dict[str, int]:
    """Class number of every label; `IGNORED` where the scene's class is not among `classes`."""
    ids = {}
    for label, value in label_names(scene).items():
        ids[label] = classes[label].index(value) if value in classes[label] else IGNORED
    return ids


def label_tensor(scenes: Sequence[Scene], classes: dict[str, tuple[str, ...]] = CLASSES) -> Tensor:
    """Class numbers int64 [N, 5], in the order of `classes`."""
    rows = [list(label_ids(scene, classes).values()) for scene in scenes]
    return torch.tensor(rows, dtype=torch.long)
