"""Proof that nothing held out is trained on: training samples of every kind are made, and every scene and word looked
at."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import Any

from seed_multimodal.errors import DataError
from seed_nano.world.records import KINDS, record_at, scenes_of, texts_of
from seed_nano.world.scene import Scene
from seed_nano.world.source import NanoFile
from seed_nano.world.splits import held_compositions, held_out
from seed_nano.world.things import HELD_OUT, THINGS
from seed_nano.world.words import captions_in, describe

_UNNAMED = re.compile(rf"\b(?:{'|'.join(form for name in HELD_OUT for form in (THINGS[name].plural, name))})\b", re.I)


def samples(seed: int, index: int) -> Iterator[tuple[str, Any]]:
    """One training sample of every kind, (kind, sample): the pairs of the tokenizer, the records of the language model
    (once of the whole stream and once of a pool)."""
    pair = NanoFile(seed=seed).locate(index).fields
    yield "pairs", {"image": pair["image"].scene, "caption": pair["caption"]}
    for kind in KINDS:
        yield kind, [record_at(kind, seed, index), record_at(kind, seed, index, pool=1000)]


def check_no_leak(number: int, seed: int = 0,
                  make: Callable[[int, int], Iterator[tuple[str, Any]]] = samples) -> dict[str, int]:
    """Look at `number` training samples of every kind; returns how many scenes of each kind were looked at.

    Raises:
        DataError: naming kind, number and what it shows or says, of the first that is held out.
    """
    seen: dict[str, int] = {}
    for index in range(number):
        for kind, sample in make(seed, index):
            shown: list[Scene] = scenes_of(sample)
            seen[kind] = seen.get(kind, 0) + len(shown)
            where = f"{kind} {index} of seed {seed}"
            for scene in shown:
                if held_out(scene):
                    raise DataError(f"{where} shows \"{describe(scene)}\", which is held out "
                                    f"({', '.join(sorted(held_out(scene)))}).")
            for text in texts_of(sample):
                for said, splits in _said(text):
                    raise DataError(f"{where} says {said!r}, which is held out ({', '.join(sorted(splits))}): {text}")
    return seen


def _said(text: str) -> Iterator[tuple[str, Collection[str]]]:
    """The words of a text that say something held out, and of which splits it is."""
    for name in _UNNAMED.finditer(text):
        yield name[0], ["things"]
    for words, said in captions_in(text):
        splits: Collection[str] = held_compositions(said.things, said.counts, said.style, said.background)
        if not splits and said.style and said.background and said.layout:
            with suppress(DataError):  # `a dog and a cat`, to tell a story about
                splits = held_out(Scene(said.style, said.background, said.layout, said.things, said.counts))
        if splits:
            yield words, splits
