"""Questions about scenes with one exact answer; yes and no equally often."""

from __future__ import annotations

import random
from dataclasses import dataclass

from seed_multimodal.data.nano.phrases import NUMBERS
from seed_multimodal.data.nano.scene import WHERE, Scene
from seed_multimodal.data.nano.things import COLOURS, NAMES, THINGS
from seed_multimodal.data.nano.verdicts import SPOTS, absent, verdict
from seed_multimodal.data.nano.words import some


@dataclass(frozen=True)
class Question:
    """`kind`: one of `KINDS` or absent; the answer in lower case, no full stop; `verdict`: what is written before it
    (see `verdicts`)."""

    kind: str
    question: str
    answer: str
    verdict: str = ""


KINDS = ("what", "count", "style", "background", "yesno", "where")


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
        return Question(kind, f"Is there {some(1, name)} in the picture?", "yes" if there else "no",
                        verdict(scene, name))
    if kind == "absent":
        name = shake.choice([n for n in NAMES if n not in scene.things])
        return Question(kind, f"Where is the {name}?", absent(name), verdict(scene, name))
    number = shake.randrange(len(scene.things))
    thing, count = scene.things[number], scene.counts[number]
    if kind == "count":
        return Question(kind, f"How many {THINGS[thing].plural} are there?", NUMBERS.get(count, "one"),
                        verdict(scene, thing) if len(scene.things) > 1 else "")
    spots = SPOTS.get(scene.layout)
    if kind == "where":
        return Question(kind, f"Where is the {thing}?", spots[number], verdict(scene, thing)) if spots else None
    if scene.layout == "two kinds":
        return None
    where = f"is {spots[number]}" if spots and scene.layout not in WHERE else "is in the picture"
    return Question(kind, f"What {where}?", some(count, thing))


def ask_any(scene: Scene, shake: random.Random) -> Question:
    """A question of a kind that the scene can answer."""
    for kind in shake.sample(KINDS, len(KINDS)):
        question = ask(scene, kind, shake)
        if question is not None:
            return question
    raise AssertionError("the style of every scene can be asked for")
