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

from seed_nano.world.scene import Scene, anchors
from seed_nano.world.things import BACKGROUNDS, HELD_OUT, NAMES, STYLES

_LAYOUTS: dict[str, tuple[str, tuple[int, ...]]] = {
    **{
        layout: (layout, (1,))
        for layout in ("large", "left", "middle", "right", "left of", "above")
    },
    **{f"many {count}": ("many", (count,)) for count in (2, 3, 4)},
    **{f"two kinds {n} {m}": ("two kinds", (n, m)) for n, m in ((1, 2), (2, 1), (2, 2))},
}
ARRANGEMENTS = tuple(_LAYOUTS)  # layouts with their counts
NOTHING = "nothing"  # the second thing of a scene with one kind
IGNORED = -100  # class number of a thing that is not among the classes; cross entropy leaves it out

CLASSES: dict[str, tuple[str, ...]] = {
    "first": NAMES,
    "second": (*NAMES, NOTHING),
    "style": STYLES,
    "background": BACKGROUNDS,
    "layout": ARRANGEMENTS,
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
    return [anchors(layout, counts) for layout, counts in _LAYOUTS.values()]


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


def label_ids(scene: Scene, classes: dict[str, tuple[str, ...]] = CLASSES) -> dict[str, int]:
    """Class number of every label; `IGNORED` where the scene's class is not among `classes`."""
    counts = map(str, scene.counts) if scene.layout in ("many", "two kinds") else ()
    names = {
        "first": scene.things[0],
        "second": scene.things[1] if len(scene.things) == 2 else NOTHING,
        "style": scene.style,
        "background": scene.background,
        "layout": " ".join((scene.layout, *counts)),
    }
    return {
        name: classes[name].index(value) if value in classes[name] else IGNORED
        for name, value in names.items()
    }


def label_tensor(scenes: Sequence[Scene], classes: dict[str, tuple[str, ...]] = CLASSES) -> Tensor:
    """Class numbers int64 [N, 5], in the order of `classes`."""
    return torch.tensor(
        [list(label_ids(scene, classes).values()) for scene in scenes], dtype=torch.long
    )
