"""Nano's world of scenes as records: pictures that are drawn when they are opened, with their captions.

    open_pairs({"format": "nano", "split": "train", "number": 400_000})

The training scenes are a stream without end, of which the first `number` are one epoch. Scene and captions are
functions of (seed, index), so nothing is stored and any run can be resumed or repeated. The other splits are the fixed
lists of `data.nano.evaluation`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seed_multimodal.data.formats.record import Record
from seed_multimodal.data.nano.evaluation import scenes
from seed_multimodal.data.nano.place import find_world
from seed_multimodal.data.nano.scene import LARGEST, SIZE, Scene, render
from seed_multimodal.data.nano.splits import check_split, scene_at
from seed_multimodal.data.nano.sprites import load_sprites
from seed_multimodal.data.nano.words import describe
from seed_multimodal.errors import ConfigError

EPOCH = 100_000  # training scenes, where no number is given
CAPTIONS = 4  # of a training scene: one is drawn each time it is seen
MOST = {"number": 2**40, "size": LARGEST}


@dataclass(frozen=True)
class Drawing:
    """The picture of a scene, drawn when it is called: pixels uint8 [size, size, 3]; small enough to be sent to a
    worker. Its `repr` names it."""

    scene: Scene
    size: int = SIZE
    folder: str | Path | None = None

    def __call__(self) -> np.ndarray:
        return render(self.scene, self.size, self.folder)


class NanoFile:
    """Records of one split by number: a `Drawing` under `image`, captions under `caption`.

    Args:
        folder: of the sprites, see `find_world`; None: where they are.
        split: `train`, or a held-out one.
        number: of scenes; None: 100,000 of train, all of a list. Of a list never more than it has.
        seed: of training scenes; another one gives others.
        size: side of the pictures in pixels.

    Raises:
        ConfigError: a setting out of range. DataError: an unknown split, or no sprites.
    """

    def __init__(self, folder: str | Path | None = None, split: str = "train", number: int | None = None,
                 seed: int = 0, size: int = SIZE) -> None:
        check_split(split)
        number = EPOCH if number is None else number
        for name, value, least in (("number", number, 1), ("seed", seed, 0), ("size", size, 8)):
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST.get(name, value):
                most = f" and at most {MOST[name]}" if name in MOST else ""
                raise ConfigError(f"nano: {name} is {value!r}; it must be a whole number of at least {least}{most}.")
        if not isinstance(folder, str | Path | None):
            raise ConfigError(f"nano: folder is {folder!r}; it must be a path.")
        self.path, self.split, self.seed, self.size = find_world(folder), split, seed, size
        self._listed = scenes(split, folder) if split != "train" else []
        self.number = min(number, len(self._listed)) if self._listed else number
        self._folder = folder
        load_sprites(folder)  # before workers are forked, so that they share it

    @property
    def sizes(self) -> Sequence[int]:
        """All scenes are one piece."""
        return [self.number]

    def locate(self, row: int) -> Record:
        """Scene number `row`, not drawn."""
        if self._listed:
            scene, key = self._listed[row], f"{self.split} {row}"
            told = [describe(scene)]
        else:
            scene, key = scene_at(self.seed, row), f"{self.split} {self.seed} {row}"
            shake = random.Random(f"{self.seed} captions {row}")
            told = [describe(scene, shake) for _ in range(CAPTIONS)]
        return Record(key, f"{self.path}: scene {key}", {"image": Drawing(scene, self.size, self._folder),
                      "caption": told}, file=str(self.path))
