"""Contents of nano's scenes: things, styles, backgrounds and all fixed texts, from
`vocabulary.yaml`."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from seed_multimodal.disk import JsonObject, replace_text
from seed_multimodal.settings import check_value

VOCABULARY: JsonObject = yaml.safe_load(
    Path(__file__).with_name("vocabulary.yaml").read_text(encoding="utf-8")
)
# English words that are spelt like known ones (of SCOWL, see data/nano/NOTICE.md).
ENGLISH = Path(__file__).with_name("english.txt")
STYLES = ("noto", "twemoji", "fluent")


def plural(name: str) -> str:
    """English plural: dogs, foxes, cherries, snowmen."""
    if name.endswith("man"):
        return name[:-3] + "men"
    if name.endswith(("s", "x", "sh", "ch", "to")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def article(phrase: str) -> str:
    """`a` or `an` before `words`."""
    return "an" if phrase[0] in "aeio" or phrase.startswith("umb") else "a"


NAMES = tuple(VOCABULARY["things"])
HELD_OUT = tuple(VOCABULARY["held_out"])  # only ever reconstructed, never named
THINGS = (*NAMES, *HELD_OUT)


def first_things(number: int | None) -> tuple[str, ...]:
    """The names of the first things; None: of all. Raises ConfigError: too few for a scene of two,
    or more than there are."""
    if number is None:
        return NAMES
    return NAMES[: check_value(int, number, "nano: things", minimum=2, maximum=len(NAMES))]


COLOURS: dict[str, tuple[int, int, int]] = {
    name: tuple(rgb) for name, rgb in VOCABULARY["colours"].items()
}
BACKGROUNDS = (*COLOURS, *VOCABULARY["place_phrases"])

# Phrases of captions. The canonical phrase stands first.
NUMBERS: dict[int, str] = VOCABULARY["numbers"]
BACKGROUND_PHRASES: dict[str, list[str]] = {
    **{name: [phrase.format(name) for phrase in VOCABULARY["colour_phrases"]] for name in COLOURS},
    **VOCABULARY["place_phrases"],
}
POSITION_PHRASES: dict[str, list[str]] = VOCABULARY["where"]
RELATIONS: dict[str, list[str]] = VOCABULARY["relations"]


def background_words(background: str, rng: random.Random) -> str:
    """`change the background to blue`, `put it in a meadow`."""
    if background in COLOURS:
        change = f"change the background to {background}"
        return rng.choice((change, f"make the background {background}"))
    return f"put it {BACKGROUND_PHRASES[background][0]}"


def drawing_phrases() -> JsonObject:
    """By which a system compares the description of its drawing with the request."""
    # In requests also "a blue background", "one on the left of another".
    backgrounds = {name: [*phrases] for name, phrases in BACKGROUND_PHRASES.items()}
    for colour in COLOURS:
        backgrounds[colour].append(f"{colour} background")
    relations = {
        "left of": [*RELATIONS["left of"], "on the left of"],
        "above": RELATIONS["above"],
    }
    opposites = {
        "left of": [*RELATIONS["right of"], "on the right of"],
        "above": RELATIONS["below"],
    }
    numbers = {str(number): [name, str(number)] for number, name in NUMBERS.items()}
    return {
        "things": {name: [name, plural(name)] for name in NAMES},
        "numbers": {"0": ["no", "without"], "1": ["one", "a single"], **numbers},
        "relations": relations,
        "opposites": opposites,
        "style": {style: [style] for style in STYLES},
        "background": backgrounds,
        "size": {"large": ["large", "big"], "small": ["small", "tiny", "little"]},
        "place": POSITION_PHRASES,
    }


UNDERSTOOD = (
    "openers",
    "closers",
    "draw",
    "remove",
    "replace",
    "add",
    "swap",
    "move",
    "bigger",
    "smaller",
    "background",
    "place",
    "style",
    "number",
    "of them",
    "another",
    "look",
    "story",
)
"""Kinds of typed requests whose every word is known."""


def write_known_words(file: Path) -> None:
    """Write a system's list of known words: names, ordinary English, numbers up to four, and what
    it can say but not draw."""
    vocabulary = {*VOCABULARY["plain"].split(), *COLOURS, *STYLES}
    for table in (BACKGROUND_PHRASES, POSITION_PHRASES, RELATIONS):
        for phrases in table.values():
            vocabulary.update(" ".join(phrases).split())
    # Requests as people type them, without what cannot be drawn or done.
    for kind in UNDERSTOOD:
        for wording in VOCABULARY["typed"][kind]:
            vocabulary.update(re.findall(r"[a-z']+", re.sub(r"\{.*?\}", "", wording.lower())))
    said = {*VOCABULARY["said"].split()}
    for talk in VOCABULARY["small_talk"]:
        said.update(re.findall(r"[a-z]+", " ".join(talk["asked"]).lower()))
    forms = {*NAMES, *map(plural, NAMES)}
    readings = names_by_phrase(VOCABULARY["phrase_readings"])
    for name, written in VOCABULARY["readings"].items():
        readings |= dict.fromkeys(map(plural, written), plural(name)) | dict.fromkeys(written, name)
    nearest: dict[str, list[str]] = {}
    for group in VOCABULARY["nearest"]:
        for word in group["words"].split():
            nearest |= dict.fromkeys((word, plural(word)), group["things"])
    content = {
        "about": f"{len(NAMES)} things",
        "names": sorted(forms),
        "words": sorted(vocabulary),
        "said": sorted(said - vocabulary),
        "phrases": drawing_phrases(),
        "readings": readings,
        "spellings": names_by_phrase(VOCABULARY["spellings"]),
        "nearest": nearest,
        "other": ENGLISH.read_text(encoding="utf-8").split(),
    }
    replace_text(file, json.dumps(content, ensure_ascii=False))


def names_by_phrase(phrases_of: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Phrase → what it names."""
    return {phrase: name for name, phrases in phrases_of.items() for phrase in phrases}
