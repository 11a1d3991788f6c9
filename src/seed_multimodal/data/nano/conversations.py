"""Multi-turn conversations with pictures on both sides, composed from captions, questions and edits.

A train conversation shows train pictures only; in test_combo a conversation shows at least one held-out
combination and may show train pictures beside it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from seed_multimodal.data.nano.families import choose, draw
from seed_multimodal.data.nano.types import Edit, NanoConversation, NanoRecord

DRAWN = "Here is the picture."
ASKS_DRAWING = ("Please draw {caption}.", "Now draw {caption}.", "Can you draw {caption}?")


def make_conversations(records: list[NanoRecord], edits: list[Edit], counts: dict[str, int]) -> list[NanoConversation]:
    """Compose conversations of 2 to 4 exchanges.

    Args:
        records: every picture.
        edits: pairs that continue a conversation about their source.
        counts: how many conversations each split gets (fewer where the split has fewer pictures).
    """
    by_key = {record.key: record for record in records}
    following: dict[tuple[str, str], list[Edit]] = defaultdict(list)
    for edit in edits:
        following[edit.split, edit.source].append(edit)
    made = []
    for split, wanted in counts.items():
        pool = sorted((r for r in records if r.split == split), key=lambda r: draw("conversation", r.key))
        for number, record in enumerate(pool[:wanted]):
            made.append(NanoConversation(split, _turns(record, pool, by_key, following, number)))
    return made


def _turns(
    start: NanoRecord,
    pool: list[NanoRecord],
    by_key: dict[str, NanoRecord],
    following: dict[tuple[str, str], list[Edit]],
    number: int,
) -> list[dict[str, Any]]:
    """Messages of one conversation: a picture is shown or drawn, asked about, changed, and another is drawn."""
    split, messages = start.split, []
    exchanges = 2 + int(draw("length", start.key) * 3)
    if number % 3 == 2:  # one in three begins with a drawing
        messages += _draw(start, "first")
        shown = start
    else:
        question = next(qa for qa in start.qa if qa.kind == "thing")
        messages += _exchange([{"image": start.key}, question.question], [question.answer])
        shown = start
    for step in range(1, exchanges):
        options = following.get((split, shown.key), [])
        kind = draw("kind", step, start.key)
        if options and kind < 0.45:
            edit = choose(options, "follow", step, start.key)
            messages += _exchange([edit.instruction], [edit.response, {"image": edit.target}])
            shown = by_key[edit.target]
        elif kind < 0.7:
            said = {part for message in messages for part in message["content"] if isinstance(part, str)}
            left = [qa for qa in shown.qa if qa.question not in said]
            question = choose(left, "ask", step, start.key)
            messages += _exchange([question.question], [question.answer])
        else:
            shown = choose(pool, "draw", step, start.key)
            messages += _draw(shown, f"{step} {start.key}")
    return messages


def _draw(record: NanoRecord, salt: str) -> list[dict[str, Any]]:
    text = choose(list(ASKS_DRAWING), "ask draw", salt, record.key)
    return _exchange([text.format(caption=record.captions[0])], [DRAWN, {"image": record.key}])


def _exchange(user: list[Any], assistant: list[Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
