"""Questions about scenes with one exact answer; yes and no equally often."""

from __future__ import annotations

import random
from dataclasses import dataclass

from seed_multimodal.data.nano.phrases import NUMBERS
from seed_multimodal.data.nano.scene import WHERE, Scene
from seed_multimodal.data.nano.things import COLOURS, NAMES, THINGS
from seed_multimodal.data.nano.words import some


@dataclass(frozen=True)
class Question:
    """`kind`: what, count, style, background, yesno or where; the answer in lower case, no full stop."""

    kind: str
    question: str
    answer: str


KINDS = ("what", "count", "style", "background", "yesno", "where")

_SPOTS = {"left of": ("on the left", "on the right"), "above": ("at the top", "at the bottom")}
_WHERE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}


def ask(scene: Scene, kind: str, shake: random.Random) -> Question | None:
    """A question of one kind, or None where the scene has no exact answer to it."""
    if kind == "style":
        return Question(kind, "Which style is it drawn in?", scene.style)
    if kind == "background":
        known = scene.background in COLOURS
        return Question(kind, "What is the background?", scene.background if known else f"a {scene.background}"
                        if scene.background in ("meadow", "room") else f"the {scene.background}")
    if kind == "yesno":
        there = shake.random() < 0.5
        name = shake.choice(scene.things) if there else shake.choice([n for n in NAMES if n not in scene.things])
        return Question(kind, f"Is there {some(1, name)} in the picture?", "yes" if there else "no")
    number = shake.randrange(len(scene.things))
    thing, count = scene.things[number], scene.counts[number]
    if kind == "count":
        return Question(kind, f"How many {THINGS[thing].plural} are there?", NUMBERS.get(count, "one"))
    if kind == "where":
        if scene.layout in WHERE:
            return Question(kind, f"Where is the {thing}?", _WHERE[scene.layout])
        spots = _SPOTS.get(scene.layout)
        return Question(kind, f"Where is the {thing}?", spots[number]) if spots else None
    if scene.layout == "two kinds":
        return None
    spots = _SPOTS.get(scene.layout)
    where = f"is {spots[number]}" if spots else "is in the picture"
    return Question(kind, f"What {where}?", some(count, thing))


def ask_any(scene: Scene, shake: random.Random) -> Question:
    """A question of a kind that the scene can answer."""
    for kind in shake.sample(KINDS, len(KINDS)):
        question = ask(scene, kind, shake)
        if question is not None:
            return question
    raise AssertionError("the style of every scene can be asked for")
