"""One training sequence of the language model, the draws it is made with, and the released fixed-length form.

A decoder (`registry.get_decoder`) turns a record's fields into a `TokenSequence`. Everything random in it comes from a
`Draws`, so the same numbers give the same sequence; the golden fixtures replay the released programs' own draws.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

IGNORED = -100  # label of a token that is not learned
T = TypeVar("T")


@dataclass
class TokenSequence:
    """Token ids and, of the same length, labels (-100: not learned).

    `extra` holds what the released decoder puts beside them (text, filter_flag, image_id). `dropped` is empty, or says
    why the released filter leaves the sample out.
    """

    ids: list[int]
    labels: list[int]
    extra: dict[str, Any] = field(default_factory=dict)
    dropped: str = ""

    def __len__(self) -> int:
        return len(self.ids)


class Draws(Protocol):
    """Where a decoder's random choices come from."""

    def uniform(self) -> float:
        """A number in [0, 1)."""

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""

    def randint(self, low: int, high: int) -> int:
        """A whole number, both ends included."""

    def shuffle(self, items: MutableSequence[Any]) -> None:
        """Reorder the items in place."""


class SeededDraws:
    """Draws that are a function of the given whole numbers alone: `SeededDraws(seed, source, position)`."""

    def __init__(self, seed: int, *numbers: int) -> None:
        key = ",".join(str(int(number)) for number in (seed, *numbers)).encode()
        self._random = random.Random(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "big"))

    def uniform(self) -> float:
        """A number in [0, 1)."""
        return self._random.random()

    def choice(self, items: Sequence[T]) -> T:
        """One of the items, all equally likely."""
        return items[self._random.randrange(len(items))]

    def randint(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return self._random.randint(low, high)

    def shuffle(self, items: MutableSequence[Any]) -> None:
        """Reorder the items in place."""
        self._random.shuffle(items)


def pad(sequence: TokenSequence, max_length: int, pad_id: int) -> dict[str, list[int]]:
    """The released fixed-length form: cut on the right at `max_length`, or filled up with `pad_id`.

    Returns:
        `input_ids`, `attention_mask` (1 on tokens) and `labels` (-100 on padding), each of length `max_length`.
    """
    ids, labels = sequence.ids[:max_length], sequence.labels[:max_length]
    rest = max_length - len(ids)
    return {"input_ids": ids + [pad_id] * rest, "attention_mask": [1] * len(ids) + [0] * rest,
            "labels": labels + [IGNORED] * rest}
