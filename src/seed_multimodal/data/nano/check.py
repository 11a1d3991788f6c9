"""Proof that nothing held out is trained on: every kind of training sample is made and its scenes looked at."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from seed_multimodal.data.nano.dialogues import conversation, document, edit_where, in_context, story, trainable
from seed_multimodal.data.nano.scene import Scene
from seed_multimodal.data.nano.splits import held_out, scene_at
from seed_multimodal.data.nano.words import describe
from seed_multimodal.errors import DataError


def samples(seed: int, index: int) -> Iterator[tuple[str, list[Scene]]]:
    """One training sample of every kind with its scenes: (kind, scenes)."""
    scene = scene_at(seed, index)
    yield "scene", [scene]
    yield "edit", [edit_where(scene, random.Random(f"{seed} edit {index}"), trainable).target]
    shake = random.Random(f"{seed} longer {index}")
    messages = conversation(shake)
    yield "conversation", [part for message in messages for part in message.content if isinstance(part, Scene)]
    examples, answer = in_context(shake)
    yield "in context", [*examples, answer]
    yield "story", [scene for _, scene in story(shake)]
    yield "document", [scene for _, scene in document(shake)]


def check_no_leak(number: int, seed: int = 0,
                  make: Callable[[int, int], Iterator[tuple[str, list[Scene]]]] = samples) -> dict[str, int]:
    """Look at `number` training samples of every kind; returns how many scenes of each kind were looked at.

    Raises:
        DataError: naming kind, number and scene of the first that is held out.
    """
    seen: dict[str, int] = {}
    for index in range(number):
        for kind, scenes in make(seed, index):
            for scene in scenes:
                if held_out(scene):
                    raise DataError(f"{kind} {index} of seed {seed} shows \"{describe(scene)}\", which is held out "
                                    f"({', '.join(sorted(held_out(scene)))}).")
            seen[kind] = seen.get(kind, 0) + len(scenes)
    return seen
