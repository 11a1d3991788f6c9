"""Captions of scenes: the canonical one, varied ones for training, and what a caption says about each label.

    describe(scene)            "a noto tiger left of a chicken on a blue background"
    read_caption(text)         Labels(style="noto", background="blue", layout="left of", things=("tiger", "chicken"), …)

`read_caption` takes every caption that `describe` can make, so that a model's words can be compared label by label.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from seed_nano.world.phrases import BACKGROUND_PHRASES, NUMBERS, RELATIONS, WHERE_PHRASES
from seed_nano.world.scene import WHERE, Scene
from seed_nano.world.things import STYLES, THINGS, article

_TURNED = {"left of": "right of", "above": "below"}


@dataclass(frozen=True)
class Labels:
    """What a caption says of a scene; None or empty: it does not say."""

    style: str | None = None
    background: str | None = None
    layout: str | None = None
    things: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()


def labels(scene: Scene) -> Labels:
    """All labels of a scene."""
    return Labels(scene.style, scene.background, scene.layout, scene.things, scene.counts)


def some(count: int, name: str, adjectives: str = "") -> str:
    """`a noto tiger`, `three noto tigers`."""
    words = f"{adjectives} {THINGS[name].plural if count > 1 else name}".strip()
    return f"{NUMBERS[count] if count > 1 else article(words)} {words}"


def describe(scene: Scene, shake: random.Random | None = None, background_first: bool = True) -> str:
    """The canonical caption; with `shake`, one of many others that say the same or less.

    Args:
        background_first: such a caption may begin with the background (`at night, a noto owl`).
    """
    def one_of(options: tuple[str, ...]) -> str:
        return shake.choice(options) if shake else options[0]

    def leave_out(share: float) -> bool:
        return shake is not None and shake.random() < share

    style = "" if leave_out(0.15) else scene.style
    first = some(scene.counts[0], scene.things[0], style)
    if scene.layout == "large" or scene.layout in WHERE:
        size = "" if leave_out(0.3) else "large" if scene.layout == "large" else "small"
        words = some(1, scene.things[0], f"{size} {style}".strip())
        if scene.layout in WHERE and not leave_out(0.1):
            words += f" {one_of(WHERE_PHRASES[scene.layout])}"
    elif scene.layout == "many":
        words = first
    elif scene.layout == "two kinds":
        words = f"{first} and {some(scene.counts[1], scene.things[1])}"
    elif leave_out(0.35):  # seen from the other thing
        words = (f"{some(1, scene.things[1], style)} {one_of(RELATIONS[_TURNED[scene.layout]])} "
                 f"{some(1, scene.things[0])}")
    else:
        words = f"{first} {one_of(RELATIONS[scene.layout])} {some(1, scene.things[1])}"
    if leave_out(0.15):
        return words
    phrase = one_of(BACKGROUND_PHRASES[scene.background])
    return f"{phrase}, {words}" if background_first and leave_out(0.2) else f"{words} {phrase}"


_PHRASES = {phrase: name for name, phrases in BACKGROUND_PHRASES.items() for phrase in phrases}
_SPOTS = {phrase: name for name, phrases in WHERE_PHRASES.items() for phrase in phrases}
_RELATION_WORDS = {phrase: name for name, phrases in RELATIONS.items() for phrase in phrases}
_NAMED = {form: name for name, thing in THINGS.items() for form in (name, thing.plural)}
_COUNTED = {"a": 1, "an": 1, **{word: number for number, word in NUMBERS.items()}}


def _either(options: dict[str, str] | dict[str, int]) -> str:
    return "|".join(sorted(map(re.escape, options), key=len, reverse=True))


_SOME = (rf"(?P<count{{0}}>{_either(_COUNTED)}) (?:(?P<size{{0}}>large|small) )?"
         rf"(?:(?P<style{{0}}>{'|'.join(STYLES)}) )?(?P<name{{0}}>{_either(_NAMED)})")
_CAPTION = re.compile(
    _SOME.format(1) + rf"(?: (?P<spot>{_either(_SPOTS)}))?"
    + rf"(?: (?:and|(?P<relation>{_either(_RELATION_WORDS)})) " + _SOME.format(2) + r")?")
_BACKGROUND = re.compile(
    rf"^(?P<before>{_either(_PHRASES)}), (?P<rest>.*)$|^(?P<rest2>.*) (?P<after>{_either(_PHRASES)})$")
_SAID = re.compile(
    rf"\b(?:(?P<before>{_either(_PHRASES)}), )?(?:{_CAPTION.pattern})(?: (?P<after>{_either(_PHRASES)}))?\b")


def normalise(text: str) -> str:
    """Lower case, single spaces, no full stop: what captions are compared in."""
    return " ".join(text.lower().split()).rstrip(".!").strip()


def read_caption(text: str) -> Labels | None:
    """What a caption says, or None when it is no sentence of nano's grammar."""
    words, background = normalise(text), None
    found = _BACKGROUND.match(words)
    if found:
        background = _PHRASES[found["before"] or found["after"]]
        words = found["rest"] or found["rest2"]
    read = _CAPTION.fullmatch(words)
    return None if read is None else _labels(read, background)


def captions_in(text: str) -> Iterator[tuple[str, Labels]]:
    """Every caption inside a text (`Please draw a noto dog at night.`), and what it says."""
    for read in _SAID.finditer(normalise(text)):
        background = read["before"] or read["after"]
        yield read[0], _labels(read, _PHRASES[background] if background else None)


def _labels(read: re.Match[str], background: str | None) -> Labels:
    things = [_NAMED[read["name1"]]] + ([_NAMED[read["name2"]]] if read["name2"] else [])
    counts = [_COUNTED[read["count1"]]] + ([_COUNTED[read["count2"]]] if read["name2"] else [])
    layout = None
    if len(things) == 2:
        relation = _RELATION_WORDS.get(read["relation"] or "", "two kinds")
        turned = {after: before for before, after in _TURNED.items()}
        if relation in turned:
            things, counts, relation = things[::-1], counts[::-1], turned[relation]
        layout = relation
    elif counts[0] > 1:
        layout = "many"
    elif read["size1"] == "large":
        layout = "large"
    elif read["spot"]:
        layout = _SPOTS[read["spot"]]
    return Labels(read["style1"] or read["style2"], background, layout, tuple(things), tuple(counts))
