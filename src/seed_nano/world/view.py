"""A scene as a picture of some size and shape, as users' pictures have: cropped a little, or with margins.

    View(scene, 200, (-0.2, 0, 1.2, 1)).pixels()      # uint8 [200, 280, 3], flat margins at both sides
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seed_nano.world.scene import SIZE, Scene, boxes, render
from seed_nano.world.wide import WideScene, render_wide, wide_boxes

SIZES = {64: 0.34, 96: 0.14, 128: 0.22, 160: 0.1, 200: 0.1, 256: 0.07, 400: 0.03}
"""Sides in pixels of pictures that are read, and how often."""
FRAMED = 0.3  # share of the pictures that are cropped or have margins
WHOLE = (0.0, 0.0, 1.0, 1.0)
Shares = tuple[float, float, float, float]


@dataclass(frozen=True)
class View:
    """`frame`: left, top, right and bottom of the picture in shares of the scene; beyond it is `margin` (a grey)."""

    scene: Scene | WideScene
    size: int = SIZE
    frame: Shares = WHOLE
    margin: int = 255

    def pixels(self, folder: str | Path | None = None) -> np.ndarray:
        """uint8 [height, width, 3]; a whole scene has `size` pixels a side."""
        whole = (render_wide(self.scene, self.size, folder) if isinstance(self.scene, WideScene)
                 else render(self.scene, self.size, folder))
        left, top, right, bottom = (round(share * self.size) for share in self.frame)
        canvas = np.full((bottom - top, right - left, 3), self.margin, np.uint8)
        x, y = max(left, 0), max(top, 0)
        inside = whole[y:min(bottom, self.size), x:min(right, self.size)]
        canvas[y - top:y - top + inside.shape[0], x - left:x - left + inside.shape[1]] = inside
        return canvas

    def boxes(self) -> list[tuple[str, Shares]]:
        """(thing, (left, top, right, bottom)) in shares of the picture, cut off at its edges."""
        left, top, right, bottom = self.frame
        width, height = right - left, bottom - top
        found = wide_boxes(self.scene) if isinstance(self.scene, WideScene) else boxes(self.scene)
        return [(name, (_inside((box[0] - left) / width), _inside((box[1] - top) / height),
                        _inside((box[2] - left) / width), _inside((box[3] - top) / height))) for name, box in found]


def any_view(scene: Scene | WideScene, shake: random.Random, framed: bool = True) -> View:
    """The scene in a random size (a wide scene in twice as many pixels) and, if `framed`, sometimes another frame."""
    size = shake.choices(list(SIZES), list(SIZES.values()))[0]
    size = min(2 * size, 400) if isinstance(scene, WideScene) else size
    frame = _frame(shake) if framed and shake.random() < FRAMED else WHOLE
    return View(scene, size, frame, shake.choice((255, 255, 0, 128)))


def _frame(shake: random.Random) -> Shares:
    """Up to a twentieth cut off each side, or margins at two opposite sides or all around."""
    if shake.random() < 0.5:
        cut = [shake.uniform(0, 0.05) for _ in range(4)]
        return cut[0], cut[1], 1 - cut[2], 1 - cut[3]
    across, down = shake.choice(((1, 0), (0, 1), (1, 1)))
    side = shake.uniform(0.03, 0.12 if across and down else 0.25)
    return -side * across, -side * down, 1 + side * across, 1 + side * down


def _inside(value: float) -> float:
    return min(max(value, 0.0), 1.0)

