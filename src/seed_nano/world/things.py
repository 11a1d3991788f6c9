"""What nano's scenes are made of: things, styles, backgrounds and all fixed English, read from `vocabulary.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

VOCABULARY: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("vocabulary.yaml").read_text(encoding="utf-8"))
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


def article(words: str) -> str:
    """`a` or `an` before `words`."""
    return "an" if words[0] in "aeio" or words.startswith("umb") else "a"


NAMES = tuple(VOCABULARY["things"])
HELD_OUT = tuple(VOCABULARY["held_out"])  # only ever reconstructed, never named
THINGS = (*NAMES, *HELD_OUT)
COLOURS: dict[str, tuple[int, int, int]] = {name: tuple(rgb) for name, rgb in VOCABULARY["colours"].items()}
PLACES = tuple(VOCABULARY["place_phrases"])
BACKGROUNDS = (*COLOURS, *PLACES)

# Phrases of captions. The canonical phrase stands first.
NUMBERS: dict[int, str] = VOCABULARY["numbers"]
BACKGROUND_PHRASES: dict[str, list[str]] = {
    **{name: [phrase.format(name) for phrase in VOCABULARY["colour_phrases"]] for name in COLOURS},
    **VOCABULARY["place_phrases"]}
WHERE_PHRASES: dict[str, list[str]] = VOCABULARY["where"]
RELATIONS: dict[str, list[str]] = VOCABULARY["relations"]
