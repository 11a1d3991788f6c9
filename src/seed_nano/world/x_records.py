"""Records of nano-x, the tiny SEED-X: those of nano's language model that it learns, with boxes and wide scenes, and
pictures of many sizes (`view`).

    x_record_at("detect", 0, 17)     {"messages": [{"role": "user", "content": [View(…), "Where are the tigers? …"]},
                                                   {"role": "assistant", "content": ["… - <box_start><loc-16>…"]}, …]}

    from nano     describe, questions, draw, edits, conversations, talk, asides, in the words of SEED-X's requests
    its own       detect, wide_describe, wide_questions, wide_detect
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count

from seed_multimodal.errors import DataError
from seed_multimodal.language.seed_x import Box
from seed_multimodal.language.tasks import (
    DESCRIBE_PROMPT,
    DRAW_PROMPT,
    DRAW_RESPONSE,
    EDIT_RESPONSE,
    QA_SUFFIX,
    SEED_X_TASKS,
)
from seed_multimodal.language.vocabulary import BOX, BOX_END, location_word
from seed_multimodal.settings import nearest
from seed_nano.world.dialogues import sentence
from seed_nano.world.records import KINDS, Record, record_at
from seed_nano.world.requests import DESCRIBE_REQUESTS
from seed_nano.world.scene import Scene
from seed_nano.world.splits import scene_at
from seed_nano.world.talk import ANSWERS
from seed_nano.world.things import NAMES, THINGS
from seed_nano.world.verdicts import absent, after, verdict
from seed_nano.world.view import View, any_view
from seed_nano.world.wide import WideScene, ask_wide, describe_wide, wide_at
from seed_nano.world.words import normalise

GRID = 64  # places of boxes along each side
OWN = ("detect", "wide_describe", "wide_questions", "wide_detect")
_SILENT = (DRAW_RESPONSE, EDIT_RESPONSE)
_DESCRIBE = (SEED_X_TASKS.describe,) * 4 + DESCRIBE_REQUESTS
Shares = tuple[float, float, float, float]


def x_record_at(kind: str, seed: int, index: int, split: str = "train", grid: int = GRID) -> Record:
    """Record number `index` of a kind; `grid`: places of boxes along each side.

    Raises:
        DataError: an unknown kind or split.
    """
    shake = random.Random(f"{seed} {split} {kind} {index}")
    if kind not in OWN:
        if kind not in KINDS:
            known = (*KINDS, *OWN)
            raise DataError(f"nano: unknown kind of records {kind!r}{nearest(kind, known)}; there are "
                            f"{', '.join(known)}.")
        return _in_sizes(_in_its_words(record_at(kind, seed, index, split), shake), shake)
    wide = kind.startswith("wide")
    view = any_view(wide_at(seed, index, split) if wide else scene_where(seed, index, split, shake), shake)
    scene = view.scene
    if kind == "wide_describe":
        assert isinstance(scene, WideScene)
        return _dialogue(view, [(shake.choice(_DESCRIBE), sentence(describe_wide(scene)))])
    if kind == "wide_questions":
        assert isinstance(scene, WideScene)
        return _dialogue(view, [_spoken(scene, *ask_wide(scene, shake)) for _ in range(4)])
    return _dialogue(view, [_located(view, name, grid) for name in _asked_for(scene, shake)])


def scene_where(seed: int, index: int, split: str, shake: random.Random) -> Scene:
    """Scene number `index`; of those with one thing every second is skipped, since there is nothing to choose in it."""
    for step in count():
        scene = scene_at(seed, index + step, split)
        if len(scene.things) > 1 or shake.random() < 0.5:
            return scene
    raise AssertionError("the stream of scenes has no end")


def _spoken(scene: WideScene, question: str, answer: str) -> tuple[str, str]:
    """A question about a wide scene; behind a verdict where it names a thing."""
    named = [name for name in scene.there if question == f"Where is the {name}?"]
    return question, after(verdict(scene, *named) if named else "", answer)


def _asked_for(scene: Scene | WideScene, shake: random.Random) -> list[str]:
    """Up to two of its things and one that is not there, in any order."""
    there = scene.there if isinstance(scene, WideScene) else list(scene.things)
    names = shake.sample(there, min(2, len(there)))
    return shake.sample([*names, shake.choice([name for name in NAMES if name not in there])], len(names) + 1)


def _located(view: View, name: str, grid: int) -> tuple[str, str]:
    """Where a thing is, asked and answered by boxes behind a verdict."""
    found = view.boxes()
    there = any(one == name for one, _ in found)
    answer = box_text(name, found, grid) if there else absent(name)
    return detect_request(name, found), after(verdict(view.scene, name, whole=True), answer)


def _in_sizes(record: Record, shake: random.Random) -> Record:
    """Its users' pictures in any size; in any frame, too, where no picture is drawn."""
    drawn = any(not isinstance(part, str) for message in record["messages"][1::2] for part in message["content"])
    return {"messages": [{**message, "content": [
        part if isinstance(part, str) or message["role"] != "user" else any_view(part, shake, not drawn)
        for part in message["content"]]} for message in record["messages"]]}


def _in_its_words(record: Record, shake: random.Random) -> Record:
    """The requests that nano's systems send, as SEED-X's send them: descriptions are sentences, answers to questions
    short and in lower case whatever picture was shown before; nothing but a description is said before a drawing."""
    said: list[Record] = []
    asked: list[object] = []
    for message in record["messages"]:
        content = message["content"]
        if message["role"] == "user":
            asked = content
            content = [_request(part, shake) if isinstance(part, str) else part for part in content]
        elif all(isinstance(part, str) for part in content) and asked[-1] not in DESCRIBE_REQUESTS:
            content = [part if part in ANSWERS else normalise(part) for part in content]
        else:
            content = [part for part in content if part not in _SILENT]
        said.append({**message, "content": content})
    return {**record, "messages": said}


def _request(text: str, shake: random.Random) -> str:
    if text == DESCRIBE_PROMPT:
        return SEED_X_TASKS.describe if shake.random() < 0.8 else text
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


def _dialogue(view: View, turns: Sequence[tuple[str, str]]) -> Record:
    messages: list[Record] = []
    for asked, answer in turns:
        messages += [{"role": "user", "content": [asked] if messages else [view, asked]},
                     {"role": "assistant", "content": [answer]}]
    return {"messages": messages}
