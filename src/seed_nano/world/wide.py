"""Scenes of four times the area, with things as small as in the others: what several views of a picture are good for.

    scene = WideScene("noto", "meadow", ("tiger", "", "penguin", ""))
    render_wide(scene)     # uint8 [128, 128, 3]; squashed to 64 pixels a thing is 14 pixels large

At most one thing stands in each quarter. What is held out of the other scenes is held out of these: no two things of a
held-out pair, no thing on a background or in a style that is held out.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seed_multimodal.errors import DataError
from seed_nano.world.phrases import BACKGROUND_PHRASES
from seed_nano.world.scene import SIDE, SIZE, Slot, paint, slot_box
from seed_nano.world.splits import check_split, held_compositions
from seed_nano.world.things import BACKGROUNDS, NAMES, STYLES
from seed_nano.world.words import normalise, some

WIDE_SIZE = 2 * SIZE
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
NOWHERE = "nothing"  # the answer about an empty quarter
_SHIFT = 0.03  # most that a thing is off the middle of its quarter, in shares of the picture
_SAID = re.compile(rf"\ban? ([a-z -]+?) at the ({'|'.join(QUARTERS)})")


@dataclass(frozen=True)
class WideScene:
    """`things`: in the quarters of `QUARTERS`, "" for none; at least one, all different."""

    style: str
    background: str
    things: tuple[str, str, str, str]
    jitter: int = 0

    def __post_init__(self) -> None:
        there = self.there
        if (self.style not in STYLES or self.background not in BACKGROUNDS or len(self.things) != len(QUARTERS)
                or not there or len(set(there)) < len(there) or not set(there) <= set(NAMES)):
            raise DataError(f"no such wide scene in nano's world: {self}")

    @property
    def there(self) -> list[str]:
        """The things that are there."""
        return [name for name in self.things if name]


def wide_at(seed: int, index: int, split: str = "train") -> WideScene:
    """Wide scene number `index` of a split's endless stream, by `held_wide`; `val` has its own stream of such that
    show nothing held out."""
    check_split(split)
    shake = random.Random(f"{seed} wide {split} {index}")
    while True:
        count = shake.choice((2, 3, 4))
        names = [*shake.sample(NAMES, count), *[""] * (len(QUARTERS) - count)]
        shake.shuffle(names)
        scene = WideScene(shake.choice(STYLES), shake.choice(BACKGROUNDS), (names[0], names[1], names[2], names[3]),
                          shake.randrange(2**31))
        if held_wide(scene) == (set() if split in ("train", "val") else {split}):
            return scene


def held_wide(scene: WideScene) -> set[str]:
    """The held-out compositions that it shows; of pairs, any two of its things."""
    there, found = scene.there, set()
    for place, name in enumerate(there):
        for other in there[place + 1:]:
            found |= held_compositions((name, other), (1, 1), scene.style, scene.background)
    return found | held_compositions(there[:1], (1,), scene.style, scene.background)


def wide_slots(scene: WideScene) -> list[Slot]:
    """Where its drawings stand."""
    found = []
    for quarter, name in enumerate(scene.things):
        shake = random.Random(f"{scene.jitter} {quarter}")
        side, across, down = (SIDE / 2 * (1 + shake.uniform(-0.07, 0.07)), *(shake.uniform(-_SHIFT, _SHIFT)
                                                                            for _ in range(2)))
        if name:
            found.append(Slot(name, 0.25 + 0.5 * (quarter % 2) + across, 0.25 + 0.5 * (quarter // 2) + down, side))
    return found


def render_wide(scene: WideScene, size: int = WIDE_SIZE, folder: str | Path | None = None) -> np.ndarray:
    """The picture, uint8 [size, size, 3]."""
    return paint(scene.style, scene.background, wide_slots(scene), size, folder)


def wide_boxes(scene: WideScene) -> list[tuple[str, tuple[float, float, float, float]]]:
    """(thing, (left, top, right, bottom)) in shares of the picture."""
    return [(slot.thing, slot_box(scene.style, slot)) for slot in wide_slots(scene)]


def describe_wide(scene: WideScene) -> str:
    """`a noto tiger at the top left, a penguin at the bottom left, in a meadow`."""
    said = [(name, quarter) for name, quarter in zip(scene.things, QUARTERS, strict=True) if name]
    parts = [f"{some(1, name, '' if place else scene.style)} at the {quarter}"
             for place, (name, quarter) in enumerate(said)]
    return ", ".join([*parts, BACKGROUND_PHRASES[scene.background][0]])


def read_wide(text: str) -> dict[str, str]:
    """Quarter -> the thing that a description says is there."""
    found = {}
    for name, quarter in _SAID.findall(normalise(text)):
        words = name.strip()
        style = next((one for one in STYLES if words.startswith(f"{one} ")), "")
        found[quarter] = words.removeprefix(f"{style} ") if style else words
    return found


def ask_wide(scene: WideScene, shake: random.Random) -> tuple[str, str]:
    """A question and its exact answer: what is in a quarter, or where a thing is."""
    quarter = shake.randrange(len(QUARTERS))
    name = scene.things[quarter]
    if name and shake.random() < 0.4:
        return f"Where is the {name}?", f"at the {QUARTERS[quarter]}"
    return f"What is at the {QUARTERS[quarter]}?", some(1, name) if name else NOWHERE
