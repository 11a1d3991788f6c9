"""Phrases of nano's captions: numbers, backgrounds, places, relations. The canonical phrase stands first."""

from __future__ import annotations

from seed_nano.world.things import COLOURS

NUMBERS = {2: "two", 3: "three", 4: "four"}

BACKGROUND_PHRASES = {
    **{name: (f"on a {name} background", f"on {name}", f"against a {name} background") for name in COLOURS},
    "meadow": ("in a meadow", "on a meadow", "on the grass"),
    "sea": ("on the sea", "at sea", "in the water"),
    "night": ("at night", "under the stars", "in the night sky"),
    "room": ("in a room", "indoors", "inside a room"),
}
WHERE_PHRASES = {
    "left": ("on the left", "at the left"), "middle": ("in the middle", "in the centre"),
    "right": ("on the right", "at the right"),
}
RELATIONS = {
    "left of": ("left of", "to the left of"), "above": ("above", "over"),
    "right of": ("right of", "to the right of"), "below": ("below", "under"),
}
