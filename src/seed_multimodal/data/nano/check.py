"""Proof that nothing held out is trained on: training samples of every kind are made, and every scene and word looked
at."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from seed_multimodal.data.nano.records import KINDS, record_at, scenes_of, texts_of
from seed_multimodal.data.nano.scene import Scene
from seed_multimodal.data.nano.splits import held_out, scene_at
from seed_multimodal.data.nano.things import HELD_OUT, THINGS
from seed_multimodal.data.nano.words import describe
from seed_multimodal.errors import DataError

_UNNAMED = re.compile(rf"\b(?:{'|'.join(form for name in HELD_OUT for form in (THINGS[name].plural, name))})\b", re.I)


def samples(seed: int, index: int) -> Iterator[tuple[str, Any]]:
    """One training sample of every kind, (kind, sample): the pairs of the tokenizer, the records of the language model
    (once of the whole stream and once of a pool)."""
    scene = scene_at(seed, index)
    yield "pairs", {"image": scene, "caption": [describe(scene, random.Random(index))]}
    for kind in KINDS:
        yield kind, [record_at(kind, seed, index), record_at(kind, seed, index, pool=1000)]


def check_no_leak(number: int, seed: int = 0,
                  make: Callable[[int, int], Iterator[tuple[str, Any]]] = samples) -> dict[str, int]:
    """Look at `number` training samples of every kind; returns how many scenes of each kind were looked at.

    Raises:
        DataError: naming kind, number and what it shows or says, of the first that is held out.
    """
    seen: dict[str, int] = {}
    for index in range(number):
        for kind, sample in make(seed, index):
            shown: list[Scene] = scenes_of(sample)
            seen[kind] = seen.get(kind, 0) + len(shown)
            where = f"{kind} {index} of seed {seed}"
            for scene in shown:
                if held_out(scene):
                    raise DataError(f"{where} shows \"{describe(scene)}\", which is held out "
                                    f"({', '.join(sorted(held_out(scene)))}).")
            for text in texts_of(sample):
                if said := _UNNAMED.search(text):
                    raise DataError(f"{where} says {said[0]!r}, which is held out (things): {text}")
    return seen
