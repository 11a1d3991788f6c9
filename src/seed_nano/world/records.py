"""Samples of nano's language model: the records that a user's own data would be, with scenes in the place of pictures.

    record_at("edits", seed, 17)      {"messages": [{"role": "user", "content": [Scene(…), "Swap their places."]}, …]}

A record is a function of its kind, seed and index. Kinds whose number of sorts is even (questions, edits) take the
sorts in turn. `with_pictures` puts something else (codes, file names) in the place of the scenes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from typing import Any, TypeVar

from seed_multimodal.errors import DataError
from seed_multimodal.language.tasks import DEFAULT_TASKS, DRAW_RESPONSE
from seed_multimodal.settings import nearest
from seed_nano.world.dialogues import (
    Allowed,
    Message,
    Part,
    conversation,
    document,
    edited,
    in_context,
    sentence,
    story,
    story_asked,
    trainable,
)
from seed_nano.world.edits import EDITS, Edit, make_edit
from seed_nano.world.questions import KINDS as QUESTIONS
from seed_nano.world.questions import Question, ask, ask_any
from seed_nano.world.requests import CONTINUE_REQUESTS, DESCRIBE_REQUESTS, DRAW_REQUESTS, examples_request
from seed_nano.world.scene import Scene
from seed_nano.world.splits import check_split, held_out, scene_at
from seed_nano.world.talk import small_talk
from seed_nano.world.things import NAMES
from seed_nano.world.verdicts import after
from seed_nano.world.view import View
from seed_nano.world.wide import WideScene
from seed_nano.world.words import describe, some

Record = dict[str, Any]
Scenes = Iterator[Scene]
Made = TypeVar("Made")
PATIENCE = 200
EDIT_SORTS = (*EDITS, "remove", "replace")  # twice: where a named thing stands is learnt last
COMPARISONS = ("yesno", "where", "yesno", "where", "absent", "count")  # kinds of questions that name a thing
ASKED = ("what", "yesno", "count", "where", "style", "yesno", "background", "where", "what", "absent")


def record_at(kind: str, seed: int, index: int, split: str = "train", pool: int = 0) -> Record:
    """Record number `index` of a kind (see `KINDS`).

    Args:
        split: no scene is held out otherwise.
        pool: kinds about a single picture take it from the first `pool` of the split's stream, so that what is
            encoded once serves many records; 0: number `index` of the stream.

    Raises:
        DataError: an unknown kind or split.
    """
    check_split(split)
    if kind not in KINDS:
        raise DataError(f"nano: unknown kind of records {kind!r}{nearest(kind, KINDS)}; there are {', '.join(KINDS)}.")
    shake = random.Random(f"{seed} {split} {kind} {index}")
    allowed = trainable if split == "train" else partial(_only, split)
    start = shake.randrange(pool) if pool else index

    def scenes() -> Scenes:
        for step in count():  # past a pool in which no scene would do
            yield scene_at(seed, (start + step) % pool if step < pool else start + step, split)

    return KINDS[kind](shake, scenes(), allowed, index)


def _only(split: str, scene: Scene) -> bool:
    return held_out(scene) <= {split}


def scenes_of(record: Record) -> list[Scene]:
    """The scenes of a record, in order."""
    found: list[Scene] = []
    with_pictures(record, lambda scene: found.append(scene))
    return found


def from_last_picture(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages from the last picture on that the user shows; what is said of one shown before is left out."""
    messages = record["messages"]
    shows = [place for place, message in enumerate(messages)
             if message["role"] == "user" and not all(isinstance(part, str) for part in message["content"])]
    return messages[shows[-1] if shows else 0:]


def texts_of(record: Any) -> Iterator[str]:
    """Every text in a record but the names of roles."""
    if isinstance(record, str):
        yield record
    elif isinstance(record, dict):
        for key, value in record.items():
            if key != "role":
                yield from texts_of(value)
    elif isinstance(record, list):
        for value in record:
            yield from texts_of(value)


def with_pictures(value: Any, picture: Callable[[Any], Any]) -> Any:
    """The same with `picture(scene)` in the place of every scene, wide one or view."""
    if isinstance(value, Scene | WideScene | View):
        return picture(value)
    if isinstance(value, dict):
        return {key: with_pictures(one, picture) for key, one in value.items()}
    return [with_pictures(one, picture) for one in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------------ the kinds


def _messages(*contents: list[Part]) -> Record:
    return {"messages": [{"role": ("user", "assistant")[place % 2], "content": content}
                         for place, content in enumerate(contents)]}


def _half(shake: random.Random, requests: tuple[str, ...]) -> str:
    """The request that systems send, or one of all of them."""
    return requests[0] if shake.random() < 0.5 else shake.choice(requests)


def _first(scenes: Scenes, sorts: tuple[str, ...], index: int, make: Callable[[Scene, str], Made | None]
           ) -> tuple[Scene, Made]:
    """The first scene of which something of sort `index` can be made, and that; of the next sort after `PATIENCE`
    scenes without (there is no `add` in a split whose every scene shows two things)."""
    for tried, scene in enumerate(scenes):
        made = make(scene, sorts[(index + tried // PATIENCE) % len(sorts)])
        if made is not None:
            return scene, made
    raise AssertionError("the stream of scenes has no end")


def _caption(shake: random.Random, scenes: Scenes, allowed: Allowed, index: int) -> Record:
    scene = next(scenes)
    return {"image_ids": scene, "text": [describe(scene), *(describe(scene, shake) for _ in range(2))]}


def _describe(shake: random.Random, scenes: Scenes, allowed: Allowed, index: int) -> Record:
    scene = next(scenes)
    own = _messages([scene, _half(shake, DESCRIBE_REQUESTS)], [sentence(describe(scene))])
    return _after_another(shake, scenes, own)


def _after_another(shake: random.Random, scenes: Scenes, record: Record) -> Record:
    """In a third of the cases the same after another picture was shown: a model that only ever looks at the first
    picture of a conversation does not learn to look at the next."""
    if shake.random() >= 1 / 3:
        return record
    scene = next(scenes)
    if shake.random() < 0.5:
        before = _messages([scene, shake.choice(DESCRIBE_REQUESTS)], [sentence(describe(scene))])
    else:
        question = ask_any(scene, shake)
        before = _messages([scene, question.question], [after(question.verdict, sentence(question.answer))])
    return {"messages": before["messages"] + record["messages"]}


def _question(shake: random.Random, scenes: Scenes, allowed: Allowed, index: int) -> Record:
    def turn(question: Question, suffixed: float) -> list[list[Part]]:
        if shake.random() < suffixed:
            return [[DEFAULT_TASKS.question(question.question)], [after(question.verdict, question.answer)]]
        return [[question.question], [after(question.verdict, sentence(question.answer))]]

    scene, question = _first(scenes, ASKED, index, lambda scene, kind: ask(scene, kind, shake, varied=True))
    turns, asked = turn(question, 0.75), {question.question}
    # A picture that is read once teaches several answers; first those that compare a word with the picture and are
    # learnt last. After an answer that names the things they would be read off the text.
    for kind in (*shake.sample(COMPARISONS, 4), *shake.sample(QUESTIONS, 1)):
        more = ask(scene, kind, shake, varied=True)
        if more is not None and more.question not in asked:
            turns, asked = turns + turn(more, 0.25), asked | {more.question}
    return _after_another(shake, scenes, _messages([scene, *turns[0]], *turns[1:]))


def _draw(shake: random.Random, scenes: Scenes, allowed: Allowed, index: int) -> Record:
    scene = next(scenes)
    words = describe(scene, None if shake.random() < 0.6 else shake, background_first=False)
    return _messages([_half(shake, DRAW_REQUESTS).format(caption=words)], [DRAW_RESPONSE, scene])


def _edit(shake: random.Random, scenes: Scenes, allowed: Allowed, index: int) -> Record:
    def make(scene: Scene, kind: str) -> Edit | None:
        edit = make_edit(scene, kind, shake)
        return edit if edit is not None and allowed(edit.target) else None

    scene, edit = _first(scenes, EDIT_SORTS, index, make)
    words = sentence(edit.instruction) if shake.random() < 0.5 else edit.instruction
    return _after_another(shake, scenes, _messages([scene, words], edited(edit.target, shake, edit.verdict)))


def _conversation(shake: random.Random, scenes: Scenes, allowed: Allowed, index: int) -> Record:
    def plain(message: Message) -> Record:
        return {"role": message.role, "content": message.content}

    return {"messages": list(map(plain, conversation(shake, allowed, stories=True)))}


def _talk(shake: random.Random, scenes: Scenes, allowed: Allowed, index: int) -> Record:
    """Small talk, alone or after a description."""
    asked, answer = small_talk(shake, bool(index % 2))
    if not index % 2:
        return _messages([asked], [answer])
    scene = next(scenes)
    return _messages([scene, shake.choice(DESCRIBE_REQUESTS)], [sentence(describe(scene))], [asked], [answer])


def _aside(shake: random.Random, scenes: Scenes, allowed: Allowed, index: int) -> Record:
    """Small talk with a picture, and what a picture does not answer."""
    asked, answer = small_talk(shake, True)
    return _messages([next(scenes), asked], [answer])


def _in_context(shake: random.Random, scenes: Scenes, allowed: Allowed, index: int) -> Record:
    examples, answer = in_context(shake, allowed)
    return _messages(examples_request(examples), edited(answer, shake))


def _story(shake: random.Random, scenes: Scenes, allowed: Allowed, index: int) -> Record:
    pages = story(shake, allowed)
    return _messages([story_asked(pages, shake)], [part for page in pages for part in page])


def _document(shake: random.Random, scenes: Scenes, allowed: Allowed, index: int) -> Record:
    pages = document(shake, allowed)
    return {"texts": [part for words, _ in pages for part in (words, None)],
            "image_ids": [part for _, scene in pages for part in (None, scene)], "metadata": {}}


def _continued(shake: random.Random, scenes: Scenes, allowed: Allowed, index: int) -> Record:
    pages = document(shake, allowed)
    shown = shake.randrange(1, len(pages))
    parts: list[list[Part]] = [[part for page in chosen for part in page] for chosen in (pages[:shown], pages[shown:])]
    return _messages([*parts[0], shake.choice(CONTINUE_REQUESTS)], parts[1])


KINDS: dict[str, Callable[[random.Random, Scenes, Allowed, int], Record]] = {
    "captions": _caption, "describe": _describe, "questions": _question, "draw": _draw, "edits": _edit,
    "conversations": _conversation, "in_context": _in_context, "stories": _story, "documents": _document,
    "continued": _continued, "talk": _talk, "asides": _aside,
}
"""Captions are pairs of a picture and texts, documents are interleaved pictures and texts, all others `messages`."""


def sentences(number: int = 500, seed: int = 0) -> list[str]:
    """What word pieces are learnt from: the texts of `number` records of every kind, every name, the template's words.

    The names stand there often enough that each becomes a piece of its own.
    """
    lines = [some(count, name) for name in NAMES for count in (1, 2)] * 20
    for kind in KINDS:
        for index in range(number):
            lines += texts_of(record_at(kind, seed, index))
    return [*lines, *["USER:", "ASSISTANT:"] * number]
