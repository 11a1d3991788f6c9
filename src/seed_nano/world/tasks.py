"""What is asked of a scene: questions with one exact answer, edits with the exact target, and verdicts.

    ask(scene, "where", rng)         Question("where", "Where is the flame?", "at the bottom", verdict="at the top …")
    make_edit(scene, "swap", rng)    Edit("swap", "swap their places", Scene(…))
    verdict(scene, "flame")          "at the top a shark: no, at the bottom a flame: yes"

A verdict stands before an answer about a named thing: the things of the scene are compared with the name, one after
another, in words. A small model that compares a word with the thing that it has just written binds names to places; one
that answers at once does not (docs/nano-data.md has the figures). Systems return what follows `VERDICT_END`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from seed_nano.world.scene import QUARTERS, WHERE, Scene, WideScene
from seed_nano.world.things import (
    BACKGROUND_PHRASES,
    BACKGROUNDS,
    COLOURS,
    NAMES,
    NUMBERS,
    STYLES,
    VOCABULARY,
    WHERE_PHRASES,
    plural,
)
from seed_nano.world.words import some

VERDICT_END = " - "
SPOTS = {"left of": ("on the left", "on the right"), "above": ("at the top", "at the bottom"),
         "left": ("on the left",), "middle": ("in the middle",), "right": ("on the right",)}


def verdict(scene: Scene | WideScene, *names: str, whole: bool = False) -> str:
    """Each thing of a scene with its place and whether it is one of `names`, until one is, or all things (`whole`)."""
    parts: list[str] = []
    for name, words in _placed(scene):
        parts.append(f"{words}: {'yes' if name in names else 'no'}")
        if name in names and not whole:
            break
    return ", ".join(parts)


def _placed(scene: Scene | WideScene) -> list[tuple[str, str]]:
    if isinstance(scene, WideScene):
        return [(name, f"at the {quarter} {some(1, name)}")
                for name, quarter in zip(scene.things, QUARTERS, strict=True) if name]
    spots = SPOTS.get(scene.layout, ("",) * len(scene.things))
    return [(name, f"{spot} {some(count, name)}".strip())
            for name, count, spot in zip(scene.things, scene.counts, spots, strict=True)]


def after(verdict: str, answer: str) -> str:
    """An answer behind its verdict, if there is one."""
    return f"{verdict}{VERDICT_END}{answer}" if verdict else answer


def absent(name: str) -> str:
    """The answer about a thing that the scene does not show."""
    return f"there is no {name}"


# ---------------------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """`kind`: one of `KINDS` or absent; the answer in lower case, no full stop; `verdict`: stands before it."""

    kind: str
    question: str
    answer: str
    verdict: str = ""


KINDS = ("what", "count", "style", "background", "yesno", "where")


def ask(scene: Scene, kind: str, rng: random.Random, varied: bool = False) -> Question | None:
    """A question of one kind, or None where the scene has no exact answer to it; `varied`: half in other wordings."""
    def worded(name: str, thing: str = "") -> str:
        wordings: list[str] = VOCABULARY["questions"][name]
        return (rng.choice(wordings) if varied and rng.random() < 0.6 else wordings[0]).format(thing)

    if kind == "style":
        return Question(kind, worded(kind), scene.style)
    if kind == "background":
        definite = {"meadow": "a ", "room": "a ", "sea": "the ", "night": "the "}
        return Question(kind, worded(kind), definite.get(scene.background, "") + scene.background)
    if kind == "yesno":
        shown = rng.random() < 0.5
        name = rng.choice(scene.things) if shown else _other_thing(scene, rng)
        return Question(kind, worded(kind, some(1, name)), "yes" if shown else "no", verdict(scene, name))
    if kind == "absent":
        name = _other_thing(scene, rng)
        return Question(kind, worded("where", name), absent(name), verdict(scene, name))
    number = rng.randrange(len(scene.things))
    thing, count = scene.things[number], scene.counts[number]
    if kind == "count":
        return Question(kind, worded(kind, plural(thing)), NUMBERS.get(count, "one"),
                        verdict(scene, thing) if len(scene.things) > 1 else "")
    spots = SPOTS.get(scene.layout)
    if kind == "where":
        return Question(kind, worded(kind, thing), spots[number], verdict(scene, thing)) if spots else None
    if scene.layout == "two kinds":
        return None
    if spots and scene.layout not in WHERE:
        return Question(kind, f"What is {spots[number]}?", some(count, thing))
    return Question(kind, worded("in the picture"), some(count, thing))


def ask_any(scene: Scene, rng: random.Random) -> Question:
    """A question of a kind that the scene can answer."""
    asked = (ask(scene, kind, rng, varied=True) for kind in rng.sample(KINDS, len(KINDS)))
    return next(question for question in asked if question is not None)


def _other_thing(scene: Scene, rng: random.Random) -> str:
    """A thing that the scene does not show."""
    return rng.choice([name for name in NAMES if name not in scene.things])


# -------------------------------------------------------------------------------------------------------------- edits


@dataclass(frozen=True)
class Edit:
    """An instruction (lower case) and the exact scene that it asks for; what it does not name stays as it was.

    `kind`: one of `EDITS`; `value`: what the same change of another scene would need (a background, a style, a thing, a
    number); `verdict`: which of the things the instruction names.
    """

    kind: str
    instruction: str
    target: Scene
    value: str = ""
    verdict: str = ""


def make_edit(scene: Scene, kind: str, rng: random.Random, value: str = "") -> Edit | None:
    """An edit of one kind, or None where the scene does not allow it. `value` fixes the new thing, background, …"""
    return EDITS[kind](scene, rng, value)


def make_any_edit(scene: Scene, rng: random.Random) -> Edit:
    """An edit of a kind that the scene allows; every kind equally often."""
    made = (make_edit(scene, kind, rng) for kind in rng.sample(list(EDITS), len(EDITS)))
    return next(edit for edit in made if edit is not None)


def background_words(background: str, rng: random.Random) -> str:
    """`change the background to blue`, `put it in a meadow`."""
    if background in COLOURS:
        return rng.choice((f"change the background to {background}", f"make the background {background}"))
    return f"put it {BACKGROUND_PHRASES[background][0]}"


def _background(scene: Scene, rng: random.Random, value: str) -> Edit | None:
    new = value or rng.choice([name for name in BACKGROUNDS if name != scene.background])
    if new == scene.background:
        return None
    return Edit("background", background_words(new, rng), scene.but(background=new), new)


def _style(scene: Scene, rng: random.Random, value: str) -> Edit | None:
    new = value or rng.choice([name for name in STYLES if name != scene.style])
    if new == scene.style:
        return None
    return Edit("style", rng.choice((f"draw it in {new} style", f"make it {new}")), scene.but(style=new), new)


def _replace(scene: Scene, rng: random.Random, value: str) -> Edit | None:
    new = value or _other_thing(scene, rng)
    if new in scene.things:
        return None
    number = rng.randrange(len(scene.things))
    name, count = scene.things[number], scene.counts[number]
    things = tuple(new if one == name else one for one in scene.things)
    old = "the " + some(count, name).split(" ", 1)[1]
    words = rng.choice((f"replace {old} with {some(count, new)}", f"turn {old} into {some(count, new)}"))
    return Edit("replace", words, scene.but(things=things), new, verdict(scene, name, whole=True))


def _add(scene: Scene, rng: random.Random, value: str) -> Edit | None:
    if scene.layout not in ("left", "right"):
        return None
    new = value or _other_thing(scene, rng)
    if new in scene.things:
        return None
    other = "right" if scene.layout == "left" else "left"
    things = (*scene.things, new) if other == "right" else (new, *scene.things)
    words = f"add {some(1, new)} {rng.choice(WHERE_PHRASES[other])}"
    return Edit("add", words, scene.but(layout="left of", things=things, counts=(1, 1)), new)


def _remove(scene: Scene, rng: random.Random, value: str) -> Edit | None:
    if scene.layout != "left of":
        return None
    number = rng.randrange(2)
    name, rest = scene.things[number], scene.things[1 - number]
    target = scene.but(layout=("right", "left")[number], things=(rest,), counts=(1,))
    words = f"{rng.choice(('remove', 'take away'))} the {name}"
    return Edit("remove", words, target, verdict=verdict(scene, name, whole=True))


def _swap(scene: Scene, rng: random.Random, value: str) -> Edit | None:
    if scene.layout not in ("left of", "above"):
        return None
    first, second = rng.sample(scene.things, 2)
    words = rng.choice((f"swap the {first} and the {second}", "swap their places"))
    return Edit("swap", words, scene.but(things=scene.things[::-1]), verdict=verdict(scene, *scene.things, whole=True))


def _move(scene: Scene, rng: random.Random, value: str) -> Edit | None:
    if scene.layout not in WHERE or value == scene.layout:
        return None
    new = value or rng.choice([name for name in WHERE if name != scene.layout])
    return Edit("move", f"move {_it(scene, rng)} to the {new}", scene.but(layout=new), new)


def _size(scene: Scene, rng: random.Random, value: str) -> Edit | None:
    new = {"large": "middle", "middle": "large"}.get(scene.layout)
    if new is None:
        return None
    words = f"make {_it(scene, rng)} {'bigger' if new == 'large' else 'smaller'}"
    return Edit("size", words, scene.but(layout=new))


def _number(scene: Scene, rng: random.Random, value: str) -> Edit | None:
    if scene.layout not in ("many", "large"):
        return None
    counts = [count for count in NUMBERS if count != scene.counts[0]]
    new = int(value) if value else rng.choice(counts)
    if new not in counts:
        return None
    return Edit("number", f"make it {some(new, scene.things[0])}", scene.but(layout="many", counts=(new,)), str(new))


def _it(scene: Scene, rng: random.Random) -> str:
    return rng.choice(("it", f"the {scene.things[0]}"))


EDITS: dict[str, Callable[[Scene, random.Random, str], Edit | None]] = {
    "replace": _replace, "add": _add, "remove": _remove, "swap": _swap, "move": _move, "size": _size,
    "background": _background, "style": _style, "number": _number}
