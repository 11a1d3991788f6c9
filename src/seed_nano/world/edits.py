"""Edits of scenes: an instruction and the exact scene that it asks for. What it does not name stays as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from seed_nano.world.phrases import BACKGROUND_PHRASES, NUMBERS, WHERE_PHRASES
from seed_nano.world.scene import WHERE, Scene
from seed_nano.world.things import BACKGROUNDS, COLOURS, NAMES, STYLES
from seed_nano.world.verdicts import verdict
from seed_nano.world.words import some


@dataclass(frozen=True)
class Edit:
    """`kind` is one of `EDITS`; `instruction` in English, lower case; `value` is what the same change of another
    scene would need (a background, a style, a thing, a number); `verdict`: which of the things an instruction names
    (see `verdicts`)."""

    kind: str
    instruction: str
    target: Scene
    value: str = ""
    verdict: str = ""


def make_edit(scene: Scene, kind: str, shake: random.Random, value: str = "") -> Edit | None:
    """An edit of one kind, or None where the scene does not allow it. `value` fixes the new thing, background, …"""
    return EDITS[kind](scene, shake, value)


def make_any_edit(scene: Scene, shake: random.Random) -> Edit:
    """An edit of a kind that the scene allows; every kind equally often."""
    for kind in shake.sample(list(EDITS), len(EDITS)):
        edit = make_edit(scene, kind, shake)
        if edit is not None:
            return edit
    raise AssertionError("the background of every scene can be changed")


def background_words(background: str, shake: random.Random) -> str:
    """`change the background to blue`, `put it in a meadow`."""
    if background in COLOURS:
        return shake.choice((f"change the background to {background}", f"make the background {background}"))
    return f"put it {BACKGROUND_PHRASES[background][0]}"


def _background(scene: Scene, shake: random.Random, value: str) -> Edit | None:
    new = value or shake.choice([name for name in BACKGROUNDS if name != scene.background])
    if new == scene.background:
        return None
    return Edit("background", background_words(new, shake), scene.but(background=new), new)


def _style(scene: Scene, shake: random.Random, value: str) -> Edit | None:
    new = value or shake.choice([name for name in STYLES if name != scene.style])
    if new == scene.style:
        return None
    words = shake.choice((f"draw it in {new} style", f"make it {new}"))
    return Edit("style", words, scene.but(style=new), new)


def _replace(scene: Scene, shake: random.Random, value: str) -> Edit | None:
    new = value or shake.choice([name for name in NAMES if name not in scene.things])
    if new in scene.things:
        return None
    number = shake.randrange(len(scene.things))
    things = tuple(new if i == number else name for i, name in enumerate(scene.things))
    count = scene.counts[number]
    old = "the " + some(count, scene.things[number]).split(" ", 1)[1]
    words = shake.choice((f"replace {old} with {some(count, new)}", f"turn {old} into {some(count, new)}"))
    return Edit("replace", words, scene.but(things=things), new,
                verdict(scene, scene.things[number], whole=True))


def _add(scene: Scene, shake: random.Random, value: str) -> Edit | None:
    if scene.layout not in ("left", "right"):
        return None
    new = value or shake.choice([name for name in NAMES if name not in scene.things])
    if new in scene.things:
        return None
    other = "right" if scene.layout == "left" else "left"
    things = (*scene.things, new) if other == "right" else (new, *scene.things)
    words = f"add {some(1, new)} {shake.choice(WHERE_PHRASES[other])}"
    return Edit("add", words, scene.but(layout="left of", things=things, counts=(1, 1)), new)


def _remove(scene: Scene, shake: random.Random, value: str) -> Edit | None:
    if scene.layout != "left of":
        return None
    number = shake.randrange(2)
    target = scene.but(layout=("right", "left")[number], things=(scene.things[1 - number],), counts=(1,))
    name = scene.things[number]
    words = f"{shake.choice(('remove', 'take away'))} the {name}"
    return Edit("remove", words, target, "", verdict(scene, name, whole=True))


def _swap(scene: Scene, shake: random.Random, value: str) -> Edit | None:
    if scene.layout not in ("left of", "above"):
        return None
    first, second = shake.sample(scene.things, 2)
    words = shake.choice((f"swap the {first} and the {second}", "swap their places"))
    return Edit("swap", words, scene.but(things=scene.things[::-1]), "", verdict(scene, *scene.things, whole=True))


def _move(scene: Scene, shake: random.Random, value: str) -> Edit | None:
    if scene.layout not in WHERE or value == scene.layout:
        return None
    new = value or shake.choice([name for name in WHERE if name != scene.layout])
    where = {"left": "to the left", "middle": "to the middle", "right": "to the right"}[new]
    return Edit("move", f"move {shake.choice(('it', 'the ' + scene.things[0]))} {where}", scene.but(layout=new), new)


def _size(scene: Scene, shake: random.Random, value: str) -> Edit | None:
    new = {"large": "middle", "middle": "large"}.get(scene.layout)
    if new is None:
        return None
    words = f"make {shake.choice(('it', 'the ' + scene.things[0]))} {'bigger' if new == 'large' else 'smaller'}"
    return Edit("size", words, scene.but(layout=new))


def _number(scene: Scene, shake: random.Random, value: str) -> Edit | None:
    if scene.layout not in ("many", "large"):
        return None
    counts = [count for count in NUMBERS if count != scene.counts[0]]
    new = int(value) if value else shake.choice(counts)
    if new not in counts:
        return None
    return Edit("number", f"make it {some(new, scene.things[0])}", scene.but(layout="many", counts=(new,)), str(new))


EDITS: dict[str, Callable[[Scene, random.Random, str], Edit | None]] = {
    "replace": _replace, "add": _add, "remove": _remove, "swap": _swap, "move": _move, "size": _size,
    "background": _background, "style": _style, "number": _number,
}
