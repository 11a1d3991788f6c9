"""Captions of scenes: the canonical one, varied ones for training, and what a caption says about
each label.

    describe(scene)            "a noto tiger left of a chicken on a blue background"
    parse_caption(text)         Labels("noto", "blue", "left of", ("tiger", "chicken"), (1, 1))

`parse_caption` parses every caption that `describe` writes, so that a model's captions can be
compared label by label.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

from seed_nano.world.scene import HORIZONTAL_CENTRES, Scene
from seed_nano.world.things import (
    BACKGROUND_PHRASES,
    NUMBERS,
    POSITION_PHRASES,
    RELATIONS,
    STYLES,
    THINGS,
    article,
    names_by_phrase,
    plural,
)

TURNED = {"left of": "right of", "above": "below"}


@dataclass(frozen=True)
class Labels:
    """The labels in a caption; None or empty: not mentioned."""

    style: str | None = None
    background: str | None = None
    layout: str | None = None
    things: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()


def noun_phrase(count: int, name: str, adjectives: str = "") -> str:
    """`a noto tiger`, `three noto tigers`."""
    phrase = f"{adjectives} {plural(name) if count > 1 else name}".strip()
    return f"{NUMBERS[count] if count > 1 else article(phrase)} {phrase}"


def sentence(clause: str) -> str:
    """A clause as a sentence: capital and full stop."""
    return f"{clause[0].upper()}{clause[1:]}."


def normalise(text: str) -> str:
    """Lower case, single spaces, no full stop: the form in which captions are compared."""
    return " ".join(text.lower().split()).rstrip(".!").strip()


def describe(scene: Scene, rng: random.Random | None = None, background_first: bool = True) -> str:
    """The canonical caption; with `rng`, one of many others that say the same or less.

    Args:
        background_first: such a caption may begin with the background (`at night, a noto owl`).
    """

    def one_of(options: Sequence[str]) -> str:
        return rng.choice(options) if rng else options[0]

    def leave_out(share: float) -> bool:
        return rng is not None and rng.random() < share

    style = "" if leave_out(0.15) else scene.style
    first = noun_phrase(scene.counts[0], scene.things[0], style)
    if scene.layout == "large" or scene.layout in HORIZONTAL_CENTRES:
        if leave_out(0.3):
            size = ""
        else:
            size = "large" if scene.layout == "large" else "small"
        caption = noun_phrase(1, scene.things[0], f"{size} {style}".strip())
        if scene.layout in HORIZONTAL_CENTRES and not leave_out(0.1):
            caption += f" {one_of(POSITION_PHRASES[scene.layout])}"
    elif scene.layout == "many":
        caption = first
    elif scene.layout == "two kinds":
        caption = f"{first} and {noun_phrase(scene.counts[1], scene.things[1])}"
    elif leave_out(0.35):  # seen from the other thing
        caption = (
            f"{noun_phrase(1, scene.things[1], style)} {one_of(RELATIONS[TURNED[scene.layout]])} "
            f"{noun_phrase(1, scene.things[0])}"
        )
    else:
        caption = f"{first} {one_of(RELATIONS[scene.layout])} {noun_phrase(1, scene.things[1])}"
    if leave_out(0.15):
        return caption
    phrase = one_of(BACKGROUND_PHRASES[scene.background])
    return f"{phrase}, {caption}" if background_first and leave_out(0.2) else f"{caption} {phrase}"


_PHRASES = names_by_phrase(BACKGROUND_PHRASES)
_SPOTS = names_by_phrase(POSITION_PHRASES)
_RELATION_WORDS = names_by_phrase(RELATIONS)
_NAMED = names_by_phrase({name: (name, plural(name)) for name in THINGS})
_COUNTED = {"a": 1, "an": 1, **{word: count for count, word in NUMBERS.items()}}


def _either(options: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, options), key=len, reverse=True))


_SOME = (
    rf"(?P<count{{0}}>{_either(_COUNTED)}) (?:(?P<size{{0}}>large|small) )?"
    rf"(?:(?P<style{{0}}>{'|'.join(STYLES)}) )?(?P<name{{0}}>{_either(_NAMED)})"
)
_CAPTION = re.compile(
    rf"(?:(?P<before>{_either(_PHRASES)}), )?"
    + _SOME.format(1)
    + rf"(?: (?P<spot>{_either(_SPOTS)}))?"
    + rf"(?: (?:and|(?P<relation>{_either(_RELATION_WORDS)})) "
    + _SOME.format(2)
    + r")?"
    + rf"(?: (?P<after>{_either(_PHRASES)}))?"
)


def parse_caption(text: str) -> Labels | None:
    """The labels in a caption, or None if it is not in nano's grammar."""
    # 1. Parse; the background may stand before or behind, not both.
    match = _CAPTION.fullmatch(normalise(text))
    if match is None or (match["before"] and match["after"]):
        return None
    things = [_NAMED[match["name1"]]]
    counts = [_COUNTED[match["count1"]]]
    # 2. The layout: by the relation of two things, else by count, size or position.
    # `right of` and `below` are the mirrored relations.
    layout = None
    if match["name2"]:
        things = [*things, _NAMED[match["name2"]]]
        counts = [*counts, _COUNTED[match["count2"]]]
        layout = _RELATION_WORDS.get(match["relation"] or "", "two kinds")
        turned = {after: before for before, after in TURNED.items()}
        if layout in turned:
            things = things[::-1]
            counts = counts[::-1]
            layout = turned[layout]
    elif counts[0] > 1:
        layout = "many"
    elif match["size1"] == "large":
        layout = "large"
    elif match["spot"]:
        layout = _SPOTS[match["spot"]]
    return Labels(
        match["style1"] or match["style2"],
        _PHRASES.get(match["before"] or match["after"]),
        layout,
        tuple(things),
        tuple(counts),
    )


def scene_of(caption: str) -> Scene:
    """The scene that a canonical caption describes."""
    return Scene(*astuple(parse_caption(caption) or Labels()))
