"""The fixed lists of scenes that everything is measured on: 1,000 different ones of every held-out split.

    scenes("pairs")[:500]

They are stored as scenes, not as numbers of a stream, so that they stay the same when the code that draws scenes
changes. Reconstruction looks at whole lists; captions, questions, drawings and edits at the first 500.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from seed_multimodal.disk import read_json_object, replace_text
from seed_multimodal.errors import DataError
from seed_multimodal.settings import nearest
from seed_nano.world.place import BUILD_HINT, LISTS, find_world
from seed_nano.world.scene import Scene
from seed_nano.world.splits import SPLITS, scene_at, split_of

HELD_OUT_SPLITS = SPLITS[1:]
NUMBER = 1_000  # scenes of a list


def scenes(split: str, folder: str | Path | None = None) -> list[Scene]:
    """The list of one held-out split; `folder`: see `find_world`.

    Raises:
        DataError: an unknown split, no lists, or a row that is no scene.
    """
    if split not in HELD_OUT_SPLITS:
        raise DataError(f"nano: there is no list of split {split!r}{nearest(split, HELD_OUT_SPLITS)}; there are "
                        f"{', '.join(HELD_OUT_SPLITS)}.")
    return list(_lists(find_world(folder))[split])


@lru_cache(maxsize=2)
def _lists(folder: Path) -> dict[str, list[Scene]]:
    file = folder / LISTS
    stored = read_json_object(file, DataError)
    for split in HELD_OUT_SPLITS:
        if not isinstance(stored.get(split), list) or not stored[split]:
            raise DataError(f"{file}: it has no list {split!r}, or an empty one; {BUILD_HINT}")
    return {split: [_scene(row, f"{file}: {split} {number}") for number, row in enumerate(stored[split])]
            for split in HELD_OUT_SPLITS}


def _scene(row: Any, where: str) -> Scene:
    try:
        style, background, layout, things, counts, jitter = row
        return Scene(style, background, layout, tuple(things), tuple(counts), jitter)
    except (ValueError, TypeError):
        raise DataError(f"{where}: is no scene [style, background, layout, things, counts, jitter].") from None
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def write_lists(folder: Path) -> None:
    """Write the lists: the first scenes of every split's stream that a viewer can tell from each other."""
    lines = []
    for split in HELD_OUT_SPLITS:
        found: dict[object, Scene] = {}
        number = 0
        while len(found) < NUMBER:
            scene = scene_at(0, number, split)
            found.setdefault(scene.key, scene)
            number += 1
        rows = (json.dumps([*scene.key, scene.jitter], separators=(",", ":")) for scene in found.values())
        lines.append(f'"{split}":[\n' + ",\n".join(rows) + "\n]")
    replace_text(folder / LISTS, "{\n" + ",\n".join(lines) + "\n}\n")


def check_lists(folder: Path) -> dict[str, int]:
    """How many scenes every list has.

    Raises:
        DataError: naming list and scene, when one is not of its split, or cannot be told from another.
    """
    for split, listed in _lists(folder).items():
        seen: set[object] = set()
        for number, scene in enumerate(listed):
            if split_of(scene) != split:
                raise DataError(f"{folder / LISTS}: {split} {number} is of split {split_of(scene)}: {scene}.")
            if scene.key in seen:
                raise DataError(f"{folder / LISTS}: {split} {number} looks like an earlier one: {scene}.")
            seen.add(scene.key)
    return {split: len(listed) for split, listed in _lists(folder).items()}
