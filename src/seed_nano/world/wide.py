"""Wide scenes; and views: scenes as images of many sizes and shapes, like those of users.

    scene = WideScene("noto", "meadow", ("tiger", "", "penguin", ""))
    render(scene, 128)                       # uint8 [128, 128, 3]
    View(scene, 200, (-0.2, 0, 1.2, 1))()    # uint8 [200, 280, 3], flat margins at both sides

Wide scenes of `train` show no two things of a held-out pair, and no thing on a background or in a
style that is held out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from seed_nano.world.scene import QUARTERS, SIZE, Box, Scene, WideScene, boxes, scene_image
from seed_nano.world.splits import check_name, held_out_compositions
from seed_nano.world.things import BACKGROUND_PHRASES, BACKGROUNDS, NAMES, STYLES
from seed_nano.world.words import noun_phrase

SIZES = {64: 0.34, 96: 0.14, 128: 0.22, 160: 0.1, 200: 0.1, 256: 0.07, 400: 0.03}
"""Sides in pixels of images that are read, and how often."""
# Of `counts` and `things` there are none: a wide scene shows one of each of the known things.
WIDE_SPLITS = ("train", "val", "pairs", "places", "styles")
FRAMED_SHARE = 0.3  # share of the images that are cropped or have margins
FULL_FRAME = (0.0, 0.0, 1.0, 1.0)


def wide_at(seed: int, index: int, split: str = "train") -> WideScene:
    """Wide scene number `index` of a split's endless stream, by `held_out_wide`; `val` has its own
    stream of such that show nothing held out.

    Raises:
        DataError: a split without wide scenes.
    """
    check_name("split of wide scenes", split, WIDE_SPLITS)
    rng = random.Random(f"{seed} wide {split} {index}")
    while True:
        count = rng.choice((2, 3, 4))
        # Draw until the scene shows exactly what the split holds out.
        names = [*rng.sample(NAMES, count), *[""] * (len(QUARTERS) - count)]
        rng.shuffle(names)
        scene = WideScene(
            rng.choice(STYLES),
            rng.choice(BACKGROUNDS),
            (names[0], names[1], names[2], names[3]),
            rng.randrange(2**31),
        )
        if held_out_wide(scene) == (set() if split in ("train", "val") else {split}):
            return scene


def held_out_wide(scene: WideScene) -> set[str]:
    """The held-out compositions that it shows; of pairs, any two of its things."""
    names = scene.present_things
    compositions = held_out_compositions(names[:1], (1,), scene.style, scene.background)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            compositions |= held_out_compositions(
                (name, other), (1, 1), scene.style, scene.background
            )
    return compositions


def describe_wide(scene: WideScene) -> str:
    """`a noto tiger at the top left, a penguin at the bottom left, in a meadow`."""
    style = scene.style
    parts = []
    for name, quarter in zip(scene.things, QUARTERS, strict=True):
        if name:
            parts.append(f"{noun_phrase(1, name, style)} at the {quarter}")
            style = ""
    return ", ".join([*parts, BACKGROUND_PHRASES[scene.background][0]])


def ask_wide(scene: WideScene, rng: random.Random) -> tuple[str, str]:
    """A question and its exact answer: what is in a quarter, or where a thing is."""
    quarter = rng.randrange(len(QUARTERS))
    name = scene.things[quarter]
    if name and rng.random() < 0.4:
        return f"Where is the {name}?", f"at the {QUARTERS[quarter]}"
    return f"What is at the {QUARTERS[quarter]}?", noun_phrase(1, name) if name else "nothing"


@dataclass(frozen=True)
class View:
    """A scene as an image that is drawn when it is called; small enough to be sent to a worker.

    `frame`: left, top, right and bottom of the image in shares of the scene; beyond it is `margin`
    (a grey).
    """

    scene: Scene | WideScene
    size: int = SIZE
    frame: Box = FULL_FRAME
    margin: int = 255
    folder: Path | None = field(default=None, repr=False)

    def __call__(self) -> np.ndarray:
        """uint8 [height, width, 3]; a whole scene has `size` pixels a side."""
        left, top, right, bottom = (round(share * self.size) for share in self.frame)
        # The scene on a canvas of the margin's grey; what is outside of the frame is cut off.
        canvas = Image.new("RGB", (right - left, bottom - top), (self.margin,) * 3)
        canvas.paste(scene_image(self.scene, self.size, self.folder), (-left, -top))
        return np.array(canvas)

    def boxes(self) -> list[tuple[str, Box]]:
        """(thing, (left, top, right, bottom)) in shares of the image, cut off at its edges."""
        left, top, right, bottom = self.frame
        starts = np.array([left, top, left, top])
        sizes = np.array([right - left, bottom - top] * 2)
        result = []
        for name, box in boxes(self.scene):
            edges = ((np.array(box) - starts) / sizes).clip(0.0, 1.0).tolist()
            result.append((name, (edges[0], edges[1], edges[2], edges[3])))
        return result


def any_view(scene: Scene | WideScene, rng: random.Random, framed: bool = True) -> View:
    """The scene in a random size (a wide scene in twice as many pixels) and, if `framed`, sometimes
    another frame."""
    size = rng.choices(list(SIZES), list(SIZES.values()))[0]
    size = min(2 * size, 400) if isinstance(scene, WideScene) else size
    frame = _frame(rng) if framed and rng.random() < FRAMED_SHARE else FULL_FRAME
    margin = rng.choice((255, 255, 0, 128))
    if margin == 255 and frame[0] < 0 and frame[1] < 0:
        margin = 128  # in a white frame, a scene looks like a drawing on white
    return View(scene, size, frame, margin)


def _frame(rng: random.Random) -> Box:
    """Up to a twentieth cut off each side, or margins at two opposite sides or all around."""
    if rng.random() < 0.5:
        cut = [rng.uniform(0, 0.05) for _ in range(4)]
        return cut[0], cut[1], 1 - cut[2], 1 - cut[3]
    across, down = rng.choice(((1, 0), (0, 1), (1, 1)))
    side = rng.uniform(0.03, 0.12 if across and down else 0.25)
    return -side * across, -side * down, 1 + side * across, 1 + side * down
