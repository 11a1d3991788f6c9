"""The record format `nano`: images that are drawn when they are opened, with their captions or as dialogues.

    open_pairs({"format": "nano", "split": "train", "number": 400_000})
    open_records(None, format="nano", options={"content": "edits", "number": 20_000})

The training scenes are a stream without end, of which the first `number` are one epoch. Scene and captions are
functions of (seed, index), so nothing is stored and any run can be resumed or repeated. The other splits are the fixed
lists of `world.evaluation`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seed_multimodal.data.formats.record import Record
from seed_multimodal.errors import ConfigError
from seed_nano.world.evaluation import scenes
from seed_nano.world.place import find_world
from seed_nano.world.records import from_last_picture, record_at, with_pictures
from seed_nano.world.scene import LARGEST, SIZE, Scene, render
from seed_nano.world.splits import check_split, scene_at
from seed_nano.world.sprites import load_sprites
from seed_nano.world.view import View
from seed_nano.world.wide import WideScene, render_wide
from seed_nano.world.words import describe
from seed_nano.world.x_records import x_record_at

EPOCH = 100_000  # training scenes, where no number is given
CAPTIONS = 4  # of a training scene: one is drawn each time it is seen
MOST = {"number": 2**40, "size": LARGEST}
X_KIND = "seed_x."  # before the kinds of nano-x
EDIT_KEYS = {"image_key": "target_image", "captioned": False, "condition_key": "source_image"}
KINDS = {"qa": "questions"}  # contents whose records have another name


@dataclass(frozen=True)
class Drawing:
    """The picture of a scene, drawn when it is called: pixels uint8 [size, size, 3]; small enough to be sent to a
    worker. Its `repr` names it."""

    scene: Scene | WideScene | View
    size: int = SIZE
    folder: str | Path | None = None

    def __call__(self) -> np.ndarray:
        if isinstance(self.scene, View):
            return self.scene.pixels(self.folder)
        if isinstance(self.scene, WideScene):
            return render_wide(self.scene, 2 * self.size)
        return render(self.scene, self.size, self.folder)


def open_nano(folder: str | Path | None = None, *, content: str = "", split: str = "train", number: int | None = None,
              seed: int = 0, size: int = SIZE) -> NanoFile | NanoContent:
    """Scenes with captions, or records of one kind (`content`, see `NanoContent`)."""
    return NanoContent(folder, content, split, number, seed) if content else NanoFile(folder, split, number, seed, size)


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


class NanoContent:
    """Records of one kind (`content`, see `world.records`; `seed_x.KIND`: `world.x_records`) and split by
    number, in the keys of a user's own: questions are `qa` or `chat`, edits `edit` or `chat`, stories `story` or
    `chat`, documents `interleaved`.

    Raises:
        DataError: an unknown split, or no drawings in the folder.
    """

    def __init__(self, folder: str | Path | None, content: str, split: str = "train", number: int | None = None,
                 seed: int = 0) -> None:
        check_split(split)
        self.path = find_world(folder)
        self.pair_keys = EDIT_KEYS if content == "edits" else {}
        load_sprites(folder)  # before workers are forked
        self.content, self.split, self.number, self.seed = content, split, number or EPOCH, seed

    @property
    def sizes(self) -> Sequence[int]:
        """All records are one piece."""
        return [self.number]

    def locate(self, row: int) -> Record:
        """Record number `row`, its pictures not drawn."""
        kind = KINDS.get(self.content, self.content)
        own = kind.startswith(X_KIND)
        made = (x_record_at if own else record_at)(kind.removeprefix(X_KIND), self.seed, row, self.split)
        name = f"{self.split} {self.content} {self.seed} {row}"
        fields = _fields(with_pictures(made, lambda scene: Drawing(scene, folder=self.path)), self.content)
        return Record(name, f"{self.path}: {name}", fields, file=str(self.path))


def _fields(made: Mapping[str, Any], content: str) -> dict[str, Any]:
    if content == "captions":
        return {"image": made["image_ids"], "caption": made["text"], "text": made["text"]}
    if content == "documents":
        return {"images": made["image_ids"], "texts": made["texts"]}
    asked, answered = (message["content"] for message in from_last_picture(made)[:2])
    fields = {"messages": [{"role": message["role"], "content": [
        {"image": part} if isinstance(part, Drawing) else part for part in message["content"]]}
        for message in made["messages"]]}
    if content in ("qa", "asides"):
        fields |= {"image": asked[0], "question": asked[1], "answer": answered[0]}
    elif content == "edits":
        fields |= {"source_image": asked[0], "instruction": asked[1], "target_image": answered[1]}
    elif content == "stories":
        fields |= {"images": answered[1::2], "captions": answered[::2]}
    return fields
