"""Evaluation samples of a report: fixed scenes, questions and edits of a split.

Scenes are the lists of `world.evaluation`; the rest is determined by (split, sizes). Only the split's compositions are
held out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import count

from seed_nano.world.scene import Scene
from seed_nano.world.splits import Allowed, held_out, scene_where
from seed_nano.world.splits import scenes as listed
from seed_nano.world.tasks import EDITS, KINDS, Edit, Question, ask, make_edit

SEED = 12345
TRIES = 600


@dataclass(frozen=True)
class Sizes:
    """Numbers of scenes (captioned, drawn, edited), reconstructions (`gallery`), sizes (`rungs`), questions."""

    scenes: int = 500
    gallery: int = 1000
    rungs: int = 200
    questions: int = 1000

    @classmethod
    def limited(cls, limit: int) -> Sizes:
        """The proportions of the full report, for `limit` scenes."""
        full = cls()
        return cls(
            **{
                name: max(1, min(number, number * limit // full.scenes))
                for name, number in vars(full).items()
            }
        )


@dataclass
class Samples:
    """The samples of one split; a question has the index of its scene, an edit the scene."""

    split: str
    sizes: Sizes
    scenes: list[Scene]
    questions: list[tuple[int, Question]] = field(default_factory=list)
    edits: list[tuple[Scene, Edit]] = field(default_factory=list)


def make_samples(split: str, sizes: Sizes) -> Samples:
    """All samples of a split."""
    made = Samples(split, sizes, listed(split)[: max(sizes.gallery, sizes.scenes)])
    if split == "things":  # only reconstructed
        return made

    def shake(kind: str, index: int) -> random.Random:
        return random.Random(f"{SEED} {split} {kind} {index}")

    def within(scene: Scene) -> bool:
        return held_out(scene) <= {split}

    def inside(scene: Scene) -> bool:
        return held_out(scene) == {split}

    made.questions = [
        _question(made.scenes[: sizes.scenes], index, shake("question", index))
        for index in range(sizes.questions)
    ]
    kinds = list(EDITS)
    made.edits = [
        _edit(kinds, shake("edit", index), index, within, inside) for index in range(sizes.scenes)
    ]
    return made


def _question(scenes: list[Scene], index: int, shake: random.Random) -> tuple[int, Question]:
    """A question of kind `index` (cyclic) about the next scene with an answer to it; if none, of the next kind."""
    number = len(scenes)
    places = (
        ((index + tried) % number, KINDS[(index + tried // number) % len(KINDS)])
        for tried in count()
    )
    return next(
        (row, found) for row, kind in places if (found := ask(scenes[row], kind, shake)) is not None
    )


def _edit(
    kinds: list[str], shake: random.Random, index: int, within: Allowed, inside: Allowed
) -> tuple[Scene, Edit]:
    """An edit of kind `index` (cyclic) with a target of the split; if the kind has none (removing a thing leaves no
    pair), one of a scene of the split. A kind without either is removed from `kinds`."""
    while True:
        kind, second = kinds[index % len(kinds)], None
        for _ in range(TRIES):
            scene = scene_where(shake, within)
            edit = make_edit(scene, kind, shake)
            if edit is not None and inside(edit.target):
                return scene, edit
            if edit is not None and inside(scene) and within(edit.target):
                second = scene, edit
        if second is not None:
            return second
        kinds.remove(kind)
