"""Records of nano-x, the tiny SEED-X: those of nano's language model that it learns, with boxes and wide scenes.

    x_record_at("detect", 0, 17)     {"messages": [{"role": "user", "content": [Scene(…), "Where are the tigers? …"]},
                                                   {"role": "assistant", "content": ["<box_start><loc-16>…"]}]}

    from nano     describe, questions, draw, edits, conversations, in the words of SEED-X's requests
    its own       detect, wide_describe, wide_questions, wide_detect
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from seed_multimodal.data.nano.dialogues import sentence
from seed_multimodal.data.nano.records import KINDS, Record, record_at
from seed_multimodal.data.nano.scene import Scene, boxes
from seed_multimodal.data.nano.splits import scene_at
from seed_multimodal.data.nano.things import THINGS
from seed_multimodal.data.nano.wide import ask_wide, describe_wide, wide_at, wide_boxes
from seed_multimodal.data.nano.words import normalise
from seed_multimodal.errors import DataError
from seed_multimodal.language.seed_x import Box
from seed_multimodal.language.tasks import (
    DESCRIBE_PROMPT,
    DESCRIBE_REQUESTS,
    DRAW_PROMPT,
    DRAW_RESPONSE,
    EDIT_RESPONSE,
    QA_SUFFIX,
    SEED_X_TASKS,
)
from seed_multimodal.language.vocabulary import BOX, BOX_END, location_word
from seed_multimodal.settings import nearest

GRID = 64  # places of boxes along each side
OWN = ("detect", "wide_describe", "wide_questions", "wide_detect")
_SILENT = (DRAW_RESPONSE, EDIT_RESPONSE)
Shares = tuple[float, float, float, float]


def x_record_at(kind: str, seed: int, index: int, split: str = "train", grid: int = GRID) -> Record:
    """Record number `index` of a kind; `grid`: places of boxes along each side.

    Raises:
        DataError: an unknown kind or split.
    """
    if kind not in OWN:
        if kind not in KINDS:
            known = (*KINDS, *OWN)
            raise DataError(f"nano: unknown kind of records {kind!r}{nearest(kind, known)}; there are "
                            f"{', '.join(known)}.")
        return _in_its_words(record_at(kind, seed, index, split))
    shake = random.Random(f"{seed} {split} {kind} {index}")
    if kind == "detect":
        scene = scene_at(seed, index, split)
        name = shake.choice(scene.things)
        return _record([scene, detect_request(name, boxes(scene))], box_text(name, boxes(scene), grid))
    wide = wide_at(seed, index, split)
    if kind == "wide_describe":
        return _record([wide, SEED_X_TASKS.describe], sentence(describe_wide(wide)))
    if kind == "wide_detect":
        name, found = shake.choice(wide.there), wide_boxes(wide)
        return _record([wide, detect_request(name, found)], box_text(name, found, grid))
    asked = [ask_wide(wide, shake) for _ in range(4)]
    messages = []
    for place, (question, answer) in enumerate(asked):
        messages += [{"role": "user", "content": [question] if place else [wide, question]},
                     {"role": "assistant", "content": [answer]}]
    return {"messages": messages}


def _in_its_words(record: Record) -> Record:
    """The requests that nano's systems send, as SEED-X's send them: descriptions are sentences, answers to questions
    short and in lower case whatever picture was shown before; nothing but a description is said before a drawing."""
    said: list[Record] = []
    asked: list[object] = []
    for message in record["messages"]:
        content = message["content"]
        if message["role"] == "user":
            asked = content
            content = [_request(part) if isinstance(part, str) else part for part in content]
        elif all(isinstance(part, str) for part in content) and asked[-1] not in DESCRIBE_REQUESTS:
            content = [normalise(part) for part in content]
        else:
            content = [part for part in content if part not in _SILENT]
        said.append({**message, "content": content})
    return {**record, "messages": said}


def _request(text: str) -> str:
    if text == DESCRIBE_PROMPT:
        return SEED_X_TASKS.describe
    before, after = DRAW_PROMPT.split("{caption}")
    if text.startswith(before) and text.endswith(after):
        return SEED_X_TASKS.draw_request(text[len(before):len(text) - len(after)])
    return text.removesuffix(QA_SUFFIX)


def detect_phrase(name: str, found: Sequence[tuple[str, Shares]]) -> str:
    """`the tiger`, `the tigers`."""
    return f"the {THINGS[name].plural if sum(one == name for one, _ in found) > 1 else name}"


def detect_request(name: str, found: Sequence[tuple[str, Shares]]) -> str:
    """The request that SEED-X's systems make of `detect_phrase`."""
    return SEED_X_TASKS.detect_request(detect_phrase(name, found))


def box_text(name: str, found: Sequence[tuple[str, Shares]], grid: int = GRID) -> str:
    """The boxes of a thing as words, row by row."""
    chosen = sorted((box for one, box in found if one == name), key=lambda box: (round(2 * box[1]), box[0]))
    return "".join(_words(Box.around([min(max(value, 0.0), 1.0) for value in box], (1, 1), grid)) for box in chosen)


def _words(box: Box) -> str:
    return BOX + "".join(map(location_word, (box.x, box.y, box.width, box.height))) + BOX_END


def _record(asked: list[Scene | object], answer: str) -> Record:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": [answer]}]}
