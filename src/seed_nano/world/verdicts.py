"""Verdicts: before a question about a named thing is answered, the things of the scene are compared with the name, one
after another, in words.

    verdict(scene, "flame")       "at the top a shark: no, at the bottom a flame: yes"

A small model that compares a word with the thing that it has just written binds names to places; one that answers at
once does not (docs/nano-data.md has the figures). Systems return what follows `VERDICT_END`.
"""

from __future__ import annotations

from seed_nano.world.scene import Scene
from seed_nano.world.wide import QUARTERS, WideScene
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


def after(verdict: str, answer: str) -> str:
    """An answer behind its verdict, if there is one."""
    return f"{verdict}{VERDICT_END}{answer}" if verdict else answer


def absent(name: str) -> str:
    """The answer about a thing that is not there."""
    return f"there is no {name}"


def _placed(scene: Scene | WideScene) -> list[tuple[str, str]]:
    if isinstance(scene, WideScene):
        return [(name, f"at the {quarter} {some(1, name)}")
                for name, quarter in zip(scene.things, QUARTERS, strict=True) if name]
    spots = SPOTS.get(scene.layout, ("",) * len(scene.things))
    return [(name, f"{spot} {some(count, name)}".strip())
            for name, count, spot in zip(scene.things, scene.counts, spots, strict=True)]
