"""Words that nano's world does not have, so that a system can say so instead of answering as if it knew.

    unknown_note("Draw a zebra.")     'nano does not know "zebra": it knows 150 things; nearest: …'
"""

from __future__ import annotations

import re
from functools import lru_cache

from seed_multimodal.data.nano.records import KINDS, record_at, with_pictures
from seed_multimodal.data.nano.things import NAMES, THINGS
from seed_multimodal.data.nano.words import nearest_things

SAMPLES = 80
"""Records of each kind whose words count as known: every wording of the grammar is among them."""

PLAIN = set("""
    able about add again all also always am and another any are around as ask at back be because been behind
    below beside between both but by can change could did different do does doing don draw each else every few
    for from generate get give go good got had has have hello her here hers his how i if image in into is it its
    itself just keep kind know let like little look looks many may me mean might mine more most much must my
    near need new next no not now of off often ok okay on once one only or other our out over paint photo
    photograph picture pictures please put quite really same say see shall she should show small so some someone
    something stay such take tell than thank thanks that the their them then there these they thing things think
    this those to together too try turn two under until up us use very want was way we well were what when where
    which while who whose why will with without would yes yet you your
""".split())
"""Ordinary English words that name nothing to draw."""


def words_in(text: str) -> list[str]:
    """Lower-case words of a text, in any alphabet; hyphens inside them are kept."""
    return re.findall(r"[^\W\d_]+(?:-[^\W\d_]+)*", text.lower())


@lru_cache(maxsize=1)
def known_words() -> frozenset[str]:
    """Every word of nano's sentences."""
    texts = [form for name in NAMES for form in (name, THINGS[name].plural)]
    for kind in KINDS:
        for index in range(SAMPLES):
            texts.append(str(with_pictures(record_at(kind, 0, index), lambda scene: None)))
    return frozenset(word for text in texts for word in words_in(text)) | PLAIN


def unknown_words(text: str) -> list[str]:
    """Words of `text` that are neither of nano's world nor ordinary ones, in order, each once."""
    return list(dict.fromkeys(word for word in words_in(text) if len(word) > 2 and word not in known_words()))


def unknown_note(text: str) -> str:
    """One sentence about words that nano does not know, with the things that look most like the first; or nothing."""
    unknown = unknown_words(text)
    if not unknown:
        return ""
    return (f"nano does not know {', '.join(map(repr, unknown[:3]))}: it knows {len(NAMES)} things; nearest: "
            f"{', '.join(nearest_things(unknown[0]))}.")
