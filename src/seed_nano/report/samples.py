"""What a report asks of a system: the fixed scenes, questions, edits, conversations, examples and stories of a split.

Scenes are the lists of `world.evaluation`; the rest is a function of (split, sizes). Nothing is held out in any other
way than the split's.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TypeVar

from seed_nano.world.dialogues import Allowed, Message, conversation, in_context, scene_where, story
from seed_nano.world.scene import Scene
from seed_nano.world.splits import held_out
from seed_nano.world.splits import scenes as listed
from seed_nano.world.tasks import EDITS, KINDS, Edit, Question, ask, make_edit

SEED = 12345
REBUILT_ONLY = "things"
CONVERSED, EXAMPLES, STORIES = ("val", "pairs"), ("val",), ("val", "pairs")
"""The splits in which there are conversations, examples of a change and stories."""
TRIES = 600

Made = TypeVar("Made")


@dataclass(frozen=True)
class Sizes:
    """How much of everything: `scenes` are described, drawn and edited, `gallery` rebuilt, `rungs` go up the ladder."""

    scenes: int = 500
    gallery: int = 1000
    rungs: int = 200
    questions: int = 1000
    conversations: int = 200
    examples: int = 200
    stories: int = 100

    @classmethod
    def limited(cls, limit: int) -> Sizes:
        """All of them in the proportions of the full report, for `limit` scenes."""
        full = cls()
        return cls(**{name: max(1, min(number, number * limit // full.scenes)) for name, number in vars(full).items()})


@dataclass
class Samples:
    """The material of one split; `questions` and `edits` come with the scene that they are about."""

    split: str
    sizes: Sizes
    scenes: list[Scene]
    questions: list[tuple[int, Question]] = field(default_factory=list)
    edits: list[tuple[Scene, Edit]] = field(default_factory=list)
    conversations: list[list[Message]] = field(default_factory=list)
    examples: list[tuple[list[Scene], Scene]] = field(default_factory=list)
    stories: list[list[tuple[str, Scene]]] = field(default_factory=list)


def make_samples(split: str, sizes: Sizes) -> Samples:
    """Everything that a report asks about a split."""
    made = Samples(split, sizes, listed(split)[: max(sizes.gallery, sizes.scenes)])
    if split == REBUILT_ONLY:
        return made

    def shakes(kind: str, number: int) -> list[random.Random]:
        return [random.Random(f"{SEED} {split} {kind} {index}") for index in range(number)]

    def within(scene: Scene) -> bool:
        return held_out(scene) <= {split}

    def inside(scene: Scene) -> bool:
        return held_out(scene) == {split}

    made.questions = [_question(made.scenes, sizes.scenes, index, shake)
                      for index, shake in enumerate(shakes("question", sizes.questions))]
    kinds = list(EDITS)
    made.edits = [_edit(kinds, shake, index, within, inside)
                  for index, shake in enumerate(shakes("edit", sizes.scenes))]
    if split in CONVERSED:
        made.conversations = [conversation(shake, inside) for shake in shakes("conversation", sizes.conversations)]
    if split in EXAMPLES:
        made.examples = [_until(lambda found: inside(found[1]), partial(in_context, shake, within))
                         for shake in shakes("examples", sizes.examples)]
    if split in STORIES:
        made.stories = [_until(lambda found: any(inside(scene) for _, scene in found), partial(story, shake, within))
                        for shake in shakes("story", sizes.stories)]
    return made


def _until(wanted: Callable[[Made], bool], make: Callable[[], Made]) -> Made:
    return next(made for made in iter(make, None) if wanted(made))


def _question(scenes: list[Scene], number: int, index: int, shake: random.Random) -> tuple[int, Question]:
    """A question of kind number `index`, in turn, about the next of the first `number` scenes that has an answer to it;
    where none has, of the next kind."""
    places = (((index + tried) % number, KINDS[(index + tried // number) % len(KINDS)]) for tried in count())
    return next((row, found) for row, kind in places if (found := ask(scenes[row], kind, shake)) is not None)


def _edit(kinds: list[str], shake: random.Random, index: int, within: Allowed,
          inside: Allowed) -> tuple[Scene, Edit]:
    """An edit of kind number `index`, in turn, with a target of the split; where no edit of the kind can have one (what
    removes a thing leaves no pair), one of a scene of the split. A kind that can be neither leaves `kinds`."""
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
