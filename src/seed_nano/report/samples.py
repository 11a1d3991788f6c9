"""Evaluation samples of a report: fixed scenes, questions and edits of a split.

Scenes are the lists of `world.evaluation`; the rest is determined by (split, sizes). Only the
split's compositions are held out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from seed_nano.world.scene import Scene
from seed_nano.world.splits import Allowed, held_out, scene_at, scene_where
from seed_nano.world.splits import scenes as listed
from seed_nano.world.tasks import EDITS, KINDS, Edit, Question, ask, make_edit

SEED = 12345
TRIES = 600


@dataclass(frozen=True)
class Sizes:
    """Numbers of scenes (captioned, drawn, edited), reconstructions (`gallery`), sizes (`rungs`),
    questions."""

    scenes: int = 500
    gallery: int = 1000
    rungs: int = 200
    questions: int = 1000

    @classmethod
    def limited(cls, limit: int) -> Sizes:
        """The proportions of the full report, for `limit` scenes."""
        full = cls()
        sizes = {}
        for name, size in vars(full).items():
            sizes[name] = max(1, min(size, size * limit // full.scenes))
        return cls(**sizes)


@dataclass
class Samples:
    """The samples of one split; a question has the index of its scene, an edit the scene."""

    split: str
    sizes: Sizes
    scenes: list[Scene]
    questions: list[tuple[int, Question]] = field(default_factory=list)
    edits: list[tuple[Scene, Edit]] = field(default_factory=list)


def make_samples(split: str, sizes: Sizes, names: Sequence[str] = ()) -> Samples:
    """All samples of a split; `names`: of scenes of these things, which are not listed."""
    n_scenes = max(sizes.gallery, sizes.scenes)
    if names:
        scenes = [scene_at(SEED, index, split, names) for index in range(n_scenes)]
    else:
        scenes = listed(split)[:n_scenes]
    samples = Samples(split, sizes, scenes)
    if split == "things":  # only reconstructed
        return samples

    def rng_of(kind: str, index: int) -> random.Random:
        return random.Random(f"{SEED} {split} {kind} {index}")

    def within(scene: Scene) -> bool:
        return held_out(scene) <= {split}

    def inside(scene: Scene) -> bool:
        return held_out(scene) == {split}

    samples.questions = [
        _question(samples.scenes[: sizes.scenes], index, rng_of("question", index))
        for index in range(sizes.questions)
    ]
    kinds = list(EDITS)
    samples.edits = [
        _edit(kinds, rng_of("edit", index), index, within, inside) for index in range(sizes.scenes)
    ]
    return samples


def _question(scenes: list[Scene], index: int, rng: random.Random) -> tuple[int, Question]:
    """A question of kind `index` (cyclic) about the next scene with an answer to it; if none, of
    the next kind."""
    n_scenes = len(scenes)
    for attempt in count():
        row = (index + attempt) % n_scenes
        kind = KINDS[(index + attempt // n_scenes) % len(KINDS)]
        question = ask(scenes[row], kind, rng)
        if question is not None:
            return row, question
    raise AssertionError("count() is endless")


def _edit(
    kinds: list[str], rng: random.Random, index: int, within: Allowed, inside: Allowed
) -> tuple[Scene, Edit]:
    """An edit of kind `index` (cyclic) with a target of the split; if the kind has none (removing a
    thing leaves no pair), one of a scene of the split. A kind without either is removed from
    `kinds`."""
    while True:
        kind = kinds[index % len(kinds)]
        second = None
        for _ in range(TRIES):
            scene = scene_where(rng, within)
            edit = make_edit(scene, kind, rng)
            if edit is not None and inside(edit.target):
                return scene, edit
            if edit is not None and inside(scene) and within(edit.target):
                second = scene, edit
        if second is not None:
            return second
        kinds.remove(kind)
