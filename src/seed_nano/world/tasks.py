"""Tasks on scenes: questions with one exact answer, edits with the exact target, and verdicts.

A verdict precedes an answer about a named thing: it compares the scene's things with the name, one
after another. Small models bind names to places with this chain of thought, but not without it
(docs/explanation/nano.md). Systems return the text after `VERDICT_END`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from seed_nano.world.scene import HORIZONTAL_CENTRES, QUARTERS, Scene, WideScene
from seed_nano.world.things import (
    BACKGROUNDS,
    NAMES,
    NUMBERS,
    POSITION_PHRASES,
    STYLES,
    VOCABULARY,
    background_words,
    plural,
)
from seed_nano.world.words import noun_phrase

VERDICT_END = " - "
SPOTS = {
    "left of": ("on the left", "on the right"),
    "above": ("at the top", "at the bottom"),
    "left": ("on the left",),
    "middle": ("in the middle",),
    "right": ("on the right",),
}


def verdict(scene: Scene | WideScene, *names: str, all_things: bool = False) -> str:
    """Each thing of a scene with its place and whether it is one of `names`, until one is, or all
    things (`whole`)."""
    parts: list[str] = []
    for name, description in _placed(scene):
        parts.append(f"{description}: {'yes' if name in names else 'no'}")
        if name in names and not all_things:
            break
    return ", ".join(parts)


def _placed(scene: Scene | WideScene) -> list[tuple[str, str]]:
    """Each thing of a scene, and itself with its place in words."""
    descriptions = []
    if isinstance(scene, WideScene):
        for name, quarter in zip(scene.things, QUARTERS, strict=True):
            if name:
                descriptions.append((name, f"at the {quarter} {noun_phrase(1, name)}"))
        return descriptions
    spots = SPOTS.get(scene.layout, ("",) * len(scene.things))
    for name, count, spot in zip(scene.things, scene.counts, spots, strict=True):
        descriptions.append((name, f"{spot} {noun_phrase(count, name)}".strip()))
    return descriptions


def after(verdict: str, answer: str) -> str:
    """An answer behind its verdict, if there is one."""
    return f"{verdict}{VERDICT_END}{answer}" if verdict else answer


def absent(name: str) -> str:
    """The answer about a thing that the scene does not show."""
    return f"there is no {name}"


@dataclass(frozen=True)
class Question:
    """`kind`: one of `KINDS` or absent; the answer in lower case, no full stop; `verdict`: stands
    before it; `named`: what the question names."""

    kind: str
    question: str
    answer: str
    verdict: str = ""
    named: str = ""


KINDS = ("what", "count", "style", "background", "yesno", "where")


def ask(scene: Scene, kind: str, rng: random.Random, varied: bool = False) -> Question | None:
    """A question of one kind, or None where the scene has no exact answer to it; `varied`: half in
    other wordings."""

    # The first wording is the one of the report; records vary it.
    def worded(name: str, thing: str = "") -> str:
        wordings: list[str] = VOCABULARY["questions"][name]
        wording = wordings[0]
        if varied and rng.random() < 0.6:
            wording = rng.choice(wordings)
        return wording.format(thing)

    if kind == "style":
        return Question(kind, worded(kind), scene.style)
    if kind == "background":
        definite = {"meadow": "a ", "room": "a ", "sea": "the ", "night": "the "}
        return Question(kind, worded(kind), definite.get(scene.background, "") + scene.background)
    if kind == "yesno":
        is_present = rng.random() < 0.5
        name = rng.choice(scene.things) if is_present else other_thing(scene, rng)
        answer = "yes" if is_present else "no"
        named = noun_phrase(1, name)
        return Question(kind, worded(kind, named), answer, verdict(scene, name), named)
    if kind == "absent":
        name = other_thing(scene, rng)
        return Question(kind, worded("where", name), absent(name), verdict(scene, name), name)
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    count = scene.counts[index]
    if kind == "count":
        before = verdict(scene, thing) if len(scene.things) > 1 else ""
        named = plural(thing)
        return Question(kind, worded(kind, named), NUMBERS.get(count, "one"), before, named)
    # Where the things are: only layouts with named positions have an exact answer.
    spots = SPOTS.get(scene.layout)
    if kind == "where":
        if not spots:
            return None
        return Question(kind, worded(kind, thing), spots[index], verdict(scene, thing), thing)

    # What is there: at a position, or in the whole image.
    if spots and scene.layout not in HORIZONTAL_CENTRES and not (varied and rng.random() < 0.5):
        return Question(kind, f"What is {spots[index]}?", noun_phrase(count, thing))
    if scene.layout == "two kinds" and not varied:
        return None
    return Question(kind, worded("in the picture"), noun_phrases(scene))


def ask_any(scene: Scene, rng: random.Random) -> Question:
    """A question of a kind that the scene can answer."""
    questions = (ask(scene, kind, rng, varied=True) for kind in rng.sample(KINDS, len(KINDS)))
    return next(question for question in questions if question is not None)


def noun_phrases(scene: Scene) -> str:
    """All things: `two dogs and a cat`."""
    return " and ".join(map(noun_phrase, scene.counts, scene.things))


def other_thing(scene: Scene, rng: random.Random) -> str:
    """A thing that the scene does not show."""
    return rng.choice([name for name in NAMES if name not in scene.things])


@dataclass(frozen=True)
class Edit:
    """An instruction (lower case) and the exact scene that it asks for; what it does not name stays
    as it was.

    `kind`: one of `EDITS`; `value`: what the same change of another scene would need (a background,
    a style, a thing, a number); `verdict`: which of the things the instruction names.
    """

    kind: str
    instruction: str
    target: Scene
    value: str = ""
    verdict: str = ""


EDITS = ("replace", "add", "remove", "swap", "move", "size", "background", "style", "number")


def make_edit(scene: Scene, kind: str, rng: random.Random, value: str = "") -> Edit | None:
    """An edit of one kind, or None where the scene does not allow it. `value`: that of an edit of
    the same kind."""
    thing = scene.things[0]
    layout = scene.layout
    instruction = ""
    changes: dict[str, object] = {}
    named: Sequence[str] = ()  # the things that the instruction names
    if kind == "replace":
        # Another thing in the place of one of the scene's, unless it is there already.
        value = value or other_thing(scene, rng)
        if value not in scene.things:
            name, count = rng.choice(list(zip(scene.things, scene.counts, strict=True)))
            old = f"the {plural(name) if count > 1 else name}"
            new = noun_phrase(count, value)
            instruction = rng.choice((f"replace {old} with {new}", f"turn {old} into {new}"))
            changes["things"] = tuple(value if other == name else other for other in scene.things)
            named = (name,)
    elif kind == "add" and layout in ("left", "right"):
        # One thing at a side: the new one goes to the other side.
        value = other_thing(scene, rng)
        other = "right" if layout == "left" else "left"
        instruction = f"add {noun_phrase(1, value)} {rng.choice(POSITION_PHRASES[other])}"
        things = (thing, value) if other == "right" else (value, thing)
        changes = {"layout": "left of", "things": things, "counts": (1, 1)}
    elif kind == "remove" and layout == "left of":
        # Two things: the other one stays where it was.
        index = rng.randrange(2)
        named = (scene.things[index],)
        instruction = f"{rng.choice(('remove', 'take away'))} the {named[0]}"
        remaining = (scene.things[1 - index],)
        changes = {"layout": ("right", "left")[index], "things": remaining, "counts": (1,)}
    elif kind == "swap" and layout in ("left of", "above"):
        named = scene.things
        first, second = rng.sample(named, 2)
        instruction = rng.choice((f"swap the {first} and the {second}", "swap their places"))
        changes["things"] = scene.things[::-1]
    elif kind == "move" and layout in HORIZONTAL_CENTRES:
        value = rng.choice([name for name in HORIZONTAL_CENTRES if name != layout])
        instruction = f"move {rng.choice(('it', f'the {thing}'))} to the {value}"
        changes["layout"] = value
    elif kind == "size" and layout in ("large", "middle"):
        size = "smaller" if layout == "large" else "bigger"
        changes["layout"] = "middle" if layout == "large" else "large"
        instruction = f"make {rng.choice(('it', f'the {thing}'))} {size}"
    elif kind == "background":
        value = value or rng.choice([name for name in BACKGROUNDS if name != scene.background])
        if value != scene.background:
            instruction = background_words(value, rng)
            changes["background"] = value
    elif kind == "style":
        value = value or rng.choice([name for name in STYLES if name != scene.style])
        if value != scene.style:
            instruction = rng.choice((f"draw it in {value} style", f"make it {value}"))
            changes["style"] = value
    elif kind == "number" and layout in ("many", "large"):
        value = value or str(rng.choice([n for n in NUMBERS if n != scene.counts[0]]))
        count = int(value)
        if count != scene.counts[0]:
            instruction = f"make it {noun_phrase(count, thing)}"
            changes = {"layout": "many", "counts": (count,)}
    if not changes:
        return None
    before = verdict(scene, *named, all_things=True) if named else ""
    return Edit(kind, instruction, scene.with_changes(**changes), value, before)


def make_any_edit(scene: Scene, rng: random.Random) -> Edit:
    """An edit of a kind that the scene allows; every kind equally often."""
    edits = (make_edit(scene, kind, rng) for kind in rng.sample(EDITS, len(EDITS)))
    return next(edit for edit in edits if edit is not None)
