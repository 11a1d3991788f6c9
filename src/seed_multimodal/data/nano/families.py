"""Concept families and the split made of them.

A family is everything that shows one thing: tone and gender folded, equal labels and pixel-equal pictures united.
Splits: `train`; `val` and `test_concept` (families unseen in any style); `test_combo` (one style of a family held
out while every label it shows stays in train in another style).

Membership follows from a hash of the family's own name, so it does not depend on the order of anything.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import TypeVar

SPLITS = ("train", "val", "test_concept", "test_combo")
VAL_SHARE = 0.05
CONCEPT_SHARE = 0.05
# Share of remaining families of which one style is held out; with three styles about 6 % of (family, style) pairs.
COMBO_SHARE = 0.18

T = TypeVar("T")


def draw(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` alone, on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / (1 << 56)


def choose(options: list[T], *parts: object) -> T:
    """One of `options`, decided by `parts` alone."""
    return options[int(draw(*parts) * len(options))]


class Union:
    """Disjoint sets over hashable names."""

    def __init__(self) -> None:
        self.parent: dict[Hashable, Hashable] = {}

    def find(self, name: Hashable) -> Hashable:
        """The set's representative."""
        self.parent.setdefault(name, name)
        root = name
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[name] != root:
            self.parent[name], name = root, self.parent[name]
        return root

    def unite(self, first: Hashable, second: Hashable) -> None:
        """Put both in one set."""
        self.parent[self.find(first)] = self.find(second)


def name_families(items: Iterable[tuple[str, list[str]]]) -> dict[str, str]:
    """Family name of each key.

    Args:
        items: (key, facts) where two keys that share any fact (folded code, folded label, pixels) are one family.

    Returns:
        key -> family name: the alphabetically first fact of the family.
    """
    items = list(items)
    union = Union()
    for key, facts in items:
        for fact in facts:
            union.unite(("key", key), ("fact", fact))
    names: dict[Hashable, str] = {}
    for key, facts in items:
        root = union.find(("key", key))
        names[root] = min([names[root], *facts] if root in names else facts)
    return {key: names[union.find(("key", key))] for key, _ in items}


def assign_splits(
    items: Iterable[tuple[str, str, str, str]], common: frozenset[str] = frozenset()
) -> dict[str, str]:
    """Split of each key.

    Args:
        items: (key, family, style, label).
        common: labels that train needs as words; their families are never val or test_concept.
    """
    families: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for key, family, style, label in items:
        families[family].append((key, style, label))
    splits: dict[str, str] = {}
    for family, members in families.items():
        place = 1.0 if any(label in common for _, _, label in members) else draw("split", family)
        if place < VAL_SHARE:
            splits.update((key, "val") for key, _, _ in members)
        elif place < VAL_SHARE + CONCEPT_SHARE:
            splits.update((key, "test_concept") for key, _, _ in members)
        else:
            held = _held_style(family, members)
            splits.update((key, "test_combo" if style == held else "train") for key, style, _ in members)
    return splits


def _held_style(family: str, members: list[tuple[str, str, str]]) -> str | None:
    """The style held out of this family, if any: one whose every label is also drawn in another style."""
    if draw("combo", family) >= COMBO_SHARE:
        return None
    labels: dict[str, set[str]] = defaultdict(set)
    for _, style, label in members:
        labels[style].add(label)
    able = sorted(
        style for style in labels
        if len(labels) > 1 and labels[style] <= set().union(*(labels[other] for other in labels if other != style))
    )
    return choose(able, "combo style", family) if able else None
