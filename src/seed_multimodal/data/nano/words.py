"""Captions and questions of one picture, all decided by its key.

The first caption names style and thing and is the one used for drawing and describing. A yes/no question's
wrong thing comes from the same split, and tags that are labels of held-out families are left out of train.
"""

from __future__ import annotations

from seed_multimodal.data.nano.families import choose, draw
from seed_multimodal.data.nano.grammar import with_article
from seed_multimodal.data.nano.types import QA, STYLE_NAMES, NanoRecord

MAX_TAGS = 4
# A main colour is asked for only when it covers this share of the drawn pixels.
CLEAR_COLOUR = 0.45

QUESTIONS = {
    "thing": ("What is this?", "What does this picture show?", "What is in the picture?", "Name the thing you see."),
    "style": ("Which style is this drawn in?", "What is the style of this picture?", "Which drawing style is this?"),
    "group": ("Which group does this belong to?", "What group of things is this in?"),
    "subgroup": ("What kind of thing is this?", "Which category is this?", "What category does this belong to?"),
    "colour": ("What is the main colour?", "Which colour is it mostly?", "What colour is this mostly?"),
    "tone": ("What is the skin tone?", "Which skin tone is shown?"),
    "yesno": ("Is this {thing}?", "Does this show {thing}?", "Can you see {thing} here?"),
}


def captions(style: str, label: str, subgroup: str, tags: list[str], tone: str | None = None) -> list[str]:
    """Captions of a picture; the first is the canonical one, naming style and thing."""
    name = STYLE_NAMES[style]
    thing = with_article(label) + (f" with {tone} skin tone" if tone else "")
    made = [f"a {name} drawing of {thing}", label, f"{thing} in {name} style", f"a {name} picture of {thing}",
            f"{label}, {subgroup}"]
    return made + [f"{label}: {', '.join(tags[:MAX_TAGS])}"] if tags else made


def questions(record: NanoRecord, colour_share: float, wrong_labels: list[str]) -> list[QA]:
    """Questions with short lower-case answers.

    Args:
        record: the picture (its `qa` is not read).
        colour_share: share (0..1) of the drawn pixels that have `record.colour`.
        wrong_labels: labels of the same split, for the question whose answer is no.
    """
    answers = {"thing": record.label, "style": STYLE_NAMES[record.style], "group": record.group,
               "subgroup": record.subgroup}
    if colour_share >= CLEAR_COLOUR:
        answers["colour"] = record.colour
    if record.tone:
        answers["tone"] = record.tone
    made = [QA(choose(list(QUESTIONS[kind]), "question", kind, record.key), answer, kind)
            for kind, answer in answers.items()]
    for answer in ("yes", "no"):
        label = record.label if answer == "yes" else _wrong(record, wrong_labels)
        if label is not None:
            text = choose(list(QUESTIONS["yesno"]), "yesno", answer, record.key)
            made.append(QA(text.format(thing=with_article(label)), answer, "yesno"))
    return made


def _wrong(record: NanoRecord, labels: list[str]) -> str | None:
    """A label of the pool that is not this picture's and does not contain or sit in it (`cat`, `cat face`)."""
    own = set(record.label.split())
    for attempt in range(20):
        label = labels[int(draw("wrong", attempt, record.key) * len(labels))]
        words = set(label.split())
        if not (words <= own or own <= words):
            return label
    return None
