"""Questions about scenes with one exact answer; yes and no equally often."""

from __future__ import annotations

import random
from dataclasses import dataclass

from seed_nano.world.phrases import NUMBERS
from seed_nano.world.scene import WHERE, Scene
from seed_nano.world.things import COLOURS, NAMES, THINGS
from seed_nano.world.verdicts import SPOTS, absent, verdict
from seed_nano.world.words import some


@dataclass(frozen=True)
class Question:
    """`kind`: one of `KINDS` or absent; the answer in lower case, no full stop; `verdict`: what is written before it
    (see `verdicts`)."""

    kind: str
    question: str
    answer: str
    verdict: str = ""


KINDS = ("what", "count", "style", "background", "yesno", "where")
WORDINGS = {
    "style": ("Which style is it drawn in?", "What style is it?", "Which style is the picture drawn in?"),
    "background": ("What is the background?", "What is in the background?", "Which background does it have?"),
    "yesno": ("Is there {} in the picture?", "Is there {}?", "Is there {} in the image?", "Is there {} here?",
              "Can you see {}?", "Do you see {}?", "Does the picture show {}?"),
    "count": ("How many {} are there?", "How many {} can you see?", "How many {} are in the picture?"),
    "where": ("Where is the {}?", "Where is the {} in the picture?", "Where can I see the {}?",
              "On which side is the {}?"),
    "in the picture": ("What is in the picture?", "What is in the image?", "What is this?"),
}
"""How a question is asked: the first wording by the report, all of them in records."""


def ask(scene: Scene, kind: str, shake: random.Random, varied: bool = False) -> Question | None:
    """A question of one kind, or None where the scene has no exact answer to it; `varied`: half in other wordings."""
    def worded(name: str, thing: str = "") -> str:
        wordings = WORDINGS[name]
        return (shake.choice(wordings) if varied and shake.random() < 0.6 else wordings[0]).format(thing)

    if kind == "style":
        return Question(kind, worded(kind), scene.style)
    if kind == "background":
        known = scene.background in COLOURS
        return Question(kind, worded(kind), scene.background if known else f"a {scene.background}"
                        if scene.background in ("meadow", "room") else f"the {scene.background}")
    if kind == "yesno":
        there = shake.random() < 0.5
        name = shake.choice(scene.things) if there else shake.choice([n for n in NAMES if n not in scene.things])
        return Question(kind, worded(kind, some(1, name)), "yes" if there else "no",
                        verdict(scene, name))
    if kind == "absent":
        name = shake.choice([n for n in NAMES if n not in scene.things])
        return Question(kind, worded("where", name), absent(name), verdict(scene, name))
    number = shake.randrange(len(scene.things))
    thing, count = scene.things[number], scene.counts[number]
    if kind == "count":
        return Question(kind, worded(kind, THINGS[thing].plural), NUMBERS.get(count, "one"),
                        verdict(scene, thing) if len(scene.things) > 1 else "")
    spots = SPOTS.get(scene.layout)
    if kind == "where":
        return Question(kind, worded(kind, thing), spots[number], verdict(scene, thing)) if spots else None
    if scene.layout == "two kinds":
        return None
    if spots and scene.layout not in WHERE:
        return Question(kind, f"What is {spots[number]}?", some(count, thing))
    return Question(kind, worded("in the picture"), some(count, thing))


def ask_any(scene: Scene, shake: random.Random) -> Question:
    """A question of a kind that the scene can answer."""
    for kind in shake.sample(KINDS, len(KINDS)):
        question = ask(scene, kind, shake, varied=True)
        if question is not None:
            return question
    raise AssertionError("the style of every scene can be asked for")
