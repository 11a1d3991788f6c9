"""Training records of the language models, in the format of user data, with scenes in place of
images.

    record_at("edits", seed, 17)
        {"messages": [{"role": "user", "content": [Scene(…), "Swap their places."]}, …]}
    x_record_at("detect", 0, 17)
        {"messages": [{"role": "user", "content": [View(…), "Where are the tigers?"]}, …]}

A record is determined by kind, seed and index. `record_at` builds those of nano; `x_record_at`
those of nano-x, the small SEED-X: the same with its prompts and images of many sizes, and further
kinds with boxes and wide scenes. `with_images` replaces the scenes by something else (codes, file
names).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from typing import Any, TypeAlias, TypeVar

from seed_multimodal.disk import JsonObject
from seed_multimodal.language import prompts
from seed_multimodal.language.vocabulary import BOX, BOX_END, location_token
from seed_multimodal.models.seed_x.processing import Box
from seed_nano.world.dialogues import (
    ANSWERS,
    DESCRIBE_REQUESTS,
    DRAW_REQUESTS,
    UNKNOWN,
    Dialogue,
    Part,
)
from seed_nano.world.scene import Scene, WideScene
from seed_nano.world.splits import (
    check_name,
    check_split,
    held_out,
    scene_at,
    scene_where,
    trainable,
)
from seed_nano.world.tasks import EDITS, Edit, Question, absent, after, ask, make_edit, verdict
from seed_nano.world.tasks import KINDS as QUESTIONS
from seed_nano.world.things import BACKGROUNDS, NAMES, NUMBERS, STYLES, VOCABULARY, plural
from seed_nano.world.typed import REFUSALS, TypedDialogue
from seed_nano.world.wide import View, any_view, ask_wide, describe_wide, wide_at
from seed_nano.world.words import describe, normalise, noun_phrase, sentence

Record: TypeAlias = JsonObject
Item = TypeVar("Item")
MAX_SCENES_PER_KIND = 200
EDIT_CYCLE = (*EDITS, "remove", "replace")  # twice: where a named thing stands is learnt last
# Kinds of questions that name a thing.
COMPARISONS = ("yesno", "where", "yesno", "where", "absent", "count")
QUESTION_CYCLE = (
    "what",
    "yesno",
    "count",
    "where",
    "style",
    "yesno",
    "background",
    "where",
    "what",
    "absent",
)
KINDS = (
    "captions",
    "describe",
    "questions",
    "draw",
    "edits",
    "conversations",
    "in_context",
    "stories",
    "documents",
    "continued",
    "talk",
    "asides",
    "requests",
    "typed_draw",
    "typed_edits",
    "typed_questions",
)
"""Captions are pairs of an image and texts, documents are interleaved images and texts, all others
`messages`."""
# Kinds of edits that examples can show.
IN_CONTEXT = ("background", "style", "replace", "size", "number")
GRID = 64  # places of boxes along each side
# Kinds that only nano-x has, and all on which it is trained.
X_ONLY_KINDS = ("detect", "wide_describe", "wide_questions", "wide_detect")
X_KINDS = (
    "describe",
    "questions",
    "draw",
    "edits",
    "conversations",
    "talk",
    "asides",
    "requests",
    *X_ONLY_KINDS,
)


def record_at(
    kind: str,
    seed: int,
    index: int,
    split: str = "train",
    pool: int = 0,
    names: Sequence[str] = NAMES,
) -> Record:
    """Record number `index` of a kind (see `KINDS`).

    Args:
        split: no scene is held out otherwise.
        pool: kinds about a single image take it from the first `pool` of the split's stream, so
            that what is encoded once serves many records; 0: number `index` of the stream.
        names: of the things.

    Raises:
        DataError: an unknown kind or split.
    """
    check_split(split)
    check_name("kind of records", kind, KINDS)
    maker = _RecordMaker(kind, seed, index, split, pool, names)
    fields: Record | None = getattr(maker, kind)()
    return fields or {"messages": maker.messages}


def scenes_of(record: Record) -> list[Scene]:
    """The scenes of a record, in order."""
    scenes: list[Scene] = []
    with_images(record, scenes.append)
    return scenes


def from_last_image(record: Record) -> list[Record]:
    """The messages from the user's last image on."""
    messages: list[Record] = record["messages"]
    for index in reversed(range(0, len(messages), 2)):
        if not _is_text(messages[index]["content"]):
            return messages[index:]
    return messages


def _is_text(content: Sequence[object]) -> bool:
    """Whether a message has no image."""
    return all(isinstance(part, str) for part in content)


def texts_of(record: Any) -> Iterator[str]:
    """Every text in a record but the names of roles."""
    if isinstance(record, str):
        yield record
    elif isinstance(record, list):
        for value in record:
            yield from texts_of(value)
    elif isinstance(record, dict):
        for key, value in record.items():
            if key != "role":
                yield from texts_of(value)


def with_images(value: Any, convert: Callable[[Any], Any]) -> Any:
    """The same with `convert(scene)` in place of every scene, wide one or view."""
    if isinstance(value, Scene | WideScene | View):
        return convert(value)
    if isinstance(value, dict):
        return {key: with_images(item, convert) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_images(item, convert) for item in value]
    return value


def sentences(n_records: int = 500, seed: int = 0) -> list[str]:
    """What word pieces are learnt from: the texts of `number` records of every kind, every name
    (often enough that each becomes a piece of its own), the template's words."""
    lines = [noun_phrase(count, name) for name in NAMES for count in (1, 2)] * 20
    for kind in KINDS:
        for index in range(n_records):
            lines += texts_of(record_at(kind, seed, index))
    return [*lines, *["USER:", "ASSISTANT:"] * n_records]


def _scenes_from(
    start: int, seed: int, split: str, pool: int, names: Sequence[str]
) -> Iterator[Scene]:
    """The scenes from number `start` on: those of the pool first, then the ones behind it."""
    for step in count():
        index = start + step
        yield scene_at(seed, index % pool if step < pool else index, split, names)


class _RecordMaker(TypedDialogue):
    """A record of nano; a method for each of `KINDS` returns its fields or says its turns."""

    def __init__(
        self, kind: str, seed: int, index: int, split: str, pool: int, names: Sequence[str]
    ) -> None:
        rng = random.Random(f"{seed} {split} {kind} {index}")
        others = {*NAMES}.difference(names)

        def allowed(scene: Scene) -> bool:
            return others.isdisjoint(scene.things) and held_out(scene) <= {split}

        super().__init__(rng, allowed)
        self.index = index
        start = rng.randrange(pool) if pool else index
        self.stream = _scenes_from(start, seed, split, pool, names)

    def captions(self) -> Record:
        scene = next(self.stream)
        texts = [describe(scene), describe(scene, self.rng), describe(scene, self.rng)]
        return {"image_ids": scene, "text": texts}

    def describe(self) -> None:
        self.look(next(self.stream), self._half(DESCRIBE_REQUESTS))
        self._begin_with_another()

    def questions(self) -> None:
        def make(scene: Scene, kind: str) -> Question | None:
            return ask(scene, kind, self.rng, varied=True)

        scene, question = self._first(QUESTION_CYCLE, make)
        self._ask(question, 0.75, scene)
        texts = {question.question}
        # Several questions to an image; first those that compare a word with the image and are
        # learnt last. After an answer that names the things they would be read off the text.
        for kind in (*self.rng.sample(COMPARISONS, 4), *self.rng.sample(QUESTIONS, 1)):
            extra = make(scene, kind)
            if extra is not None and extra.question not in texts:
                self._ask(extra, 0.25)
                texts.add(extra.question)
        self._begin_with_another()

    def draw(self) -> None:
        scene = next(self.stream)
        wording = None if self.rng.random() < 0.6 else self.rng
        caption = describe(scene, wording, background_first=False)
        request = self._half(DRAW_REQUESTS).format(caption=caption)
        self.say([request], [prompts.DRAW_RESPONSE, scene])

    def edits(self) -> None:
        def make(scene: Scene, kind: str) -> Edit | None:
            edit = make_edit(scene, kind, self.rng)
            return edit if edit is not None and self.allowed(edit.target) else None

        scene, edit = self._first(EDIT_CYCLE, make)
        instruction = sentence(edit.instruction) if self.rng.random() < 0.5 else edit.instruction
        self.say([scene, instruction], self.edit_answer(edit))
        self._begin_with_another()

    def conversations(self) -> None:
        self.converse()

    def talk(self) -> None:
        """Small talk, alone or after a description; its words are drawn first."""
        self.small(bool(self.index % 2))
        if self.index % 2:
            self._begin_with(lambda: self.look(next(self.stream)))

    def asides(self) -> None:
        """An image with a question that it does not answer. Small talk comes without an image of
        its own: a request about the image must not be taken for it."""
        scene = next(self.stream)
        self.say([scene, self.rng.choice(VOCABULARY["unanswerable"])], [UNKNOWN])

    def requests(self) -> None:
        self.conversation()

    # Single requests, for systems that do not converse.

    def typed_draw(self) -> None:
        if self.rng.random() < 0.15:
            self.drawing_without()
        else:
            self.typed_drawing()

    def typed_edits(self) -> None:
        self.typed_edit(next(self.stream))

    def typed_questions(self) -> None:
        if self.rng.random() < 0.3:
            self.typed_look()
        else:
            self.shown_question()

    def in_context(self) -> None:
        """Two examples of one change (before, after, before, after) and a third scene; the answer
        is its change."""
        kind = self.rng.choice(IN_CONTEXT)
        value = ""
        edits: list[tuple[Scene, Edit]] = []
        while len(edits) < 3:
            scene = scene_where(self.rng, self.allowed)
            edit = make_edit(scene, kind, self.rng, value)
            # With one thing, and for `size` one direction, the examples allow no other reading.
            unambiguous = len(scene.things) == 1 and (
                kind != "size" or not edits or scene.layout == edits[0][0].layout
            )
            if edit is not None and unambiguous and self.allowed(edit.target):
                edits.append((scene, edit))
                value = edit.value
        (first, changed), (second, changed_too), (third, last) = edits
        request: list[Part] = [first, "becomes", changed.target, "and"]
        request += [second, "becomes", changed_too.target, "Do the same with this one:", third]
        self.say(request, self.edit_answer(Edit(kind, "", last.target)))

    def stories(self) -> None:
        self.story()

    def documents(self) -> Record:
        texts: list[str | None] = []
        images: list[Scene | None] = []
        for text, scene in self._pages():
            texts += [text, None]
            images += [None, scene]
        return {"texts": texts, "image_ids": images, "metadata": {}}

    def continued(self) -> None:
        pages = self._pages()
        n_before = self.rng.randrange(1, len(pages))
        before = chain.from_iterable(pages[:n_before])
        request = [*before, self.rng.choice(VOCABULARY["continue"])]
        self.say(request, chain.from_iterable(pages[n_before:]))

    def _pages(self) -> list[tuple[str, Scene]]:
        """Three letters (`A is for ant.`) or a thing counted (`Two ants.`), with a scene each."""
        rng = self.rng
        letters = sorted({name[0] for name in NAMES})
        while True:
            style = rng.choice(STYLES)
            background = rng.choice(BACKGROUNDS)
            jitter = rng.randrange(2**31)
            texts: list[tuple[str, str, int]] = []  # with a thing and its number
            if rng.random() < 0.5:
                # Three letters of the alphabet in order, a thing with each.
                start = rng.randrange(len(letters) - 2)
                for letter in letters[start : start + 3]:
                    name = rng.choice([name for name in NAMES if name[0] == letter])
                    texts.append((f"{letter.upper()} is for {name}.", name, 1))
            else:
                # One thing, counted up to four.
                name = rng.choice(NAMES)
                texts.append((f"One {name}.", name, 1))
                for n_things, word in NUMBERS.items():
                    texts.append((f"{word.capitalize()} {plural(name)}.", name, n_things))

            # Scenes of one style, which all must be allowed.
            pages = []
            for text, name, n_things in texts:
                layout = "many" if n_things > 1 else "large"
                scene = Scene(style, background, layout, (name,), (n_things,), jitter)
                pages.append((text, scene))
            if all(self.allowed(scene) for _, scene in pages):
                return pages

    def _half(self, requests: tuple[str, ...]) -> str:
        """The request that systems send, or one of all of them."""
        return requests[0] if self.rng.random() < 0.5 else self.rng.choice(requests)

    def _first(
        self, sorts: tuple[str, ...], make: Callable[[Scene, str], Item | None]
    ) -> tuple[Scene, Item]:
        """The first scene of which something of the record's sort can be made, and that; of the
        next sort after `MAX_SCENES_PER_KIND` scenes without (no scene of the split `pairs` allows
        `add`)."""
        for attempt, scene in enumerate(self.stream):
            sort = sorts[(self.index + attempt // MAX_SCENES_PER_KIND) % len(sorts)]
            item = make(scene, sort)
            if item is not None:
                return scene, item
        raise AssertionError("the stream of scenes is endless")

    def _ask(self, question: Question, suffixed: float, *images: Scene) -> None:
        """A question and its answer: short, asked for by the suffix of QA, or a sentence."""
        if self.rng.random() < suffixed:
            text = prompts.DEFAULT_TASKS.question(question.question)
            self.say([*images, text], [after(question.verdict, question.answer)])
        else:
            self.ask(question, *images)

    def _begin_with_another(self) -> None:
        """In a third of the cases, turns about another image before: else a model learns to look at
        the first one only."""
        if self.rng.random() < 1 / 3:
            scene = next(self.stream)
            looks = self.rng.random() < 0.5
            self._begin_with(lambda: self.look(scene) if looks else self.question(scene))

    def _begin_with(self, turn: Callable[[], None]) -> None:
        """Say a turn before all others."""
        later = self.messages
        self.messages = []
        turn()
        self.messages += later


def x_record_at(kind: str, seed: int, index: int, split: str = "train") -> Record:
    """Record number `index` of a kind of nano (those with messages) or of `X_ONLY_KINDS`; user
    images are views."""
    check_name("kind of records", kind, (*KINDS, *X_ONLY_KINDS))
    rng = random.Random(f"{seed} {split} {kind} {index}")
    # Kinds of nano get SEED-X's prompts and images of many sizes.
    if kind not in X_ONLY_KINDS:
        record = _with_seed_x_prompts(record_at(kind, seed, index, split), rng)
        return _with_random_views(record, rng)
    dialogue = Dialogue(rng, trainable)
    wide = wide_at(seed, index, split) if kind != "detect" else None
    view = any_view(wide or _mostly_two(seed, index, split, rng), rng)
    if kind == "wide_describe" and wide:
        request = rng.choice((prompts.SEED_X_TASKS.describe,) * 4 + DESCRIBE_REQUESTS)
        turns = [(request, sentence(describe_wide(wide)))]
    elif kind == "wide_questions" and wide:
        turns = [_wide_question(wide, rng) for _ in range(4)]
    else:
        things = [name for name in view.scene.things if name]
        turns = [_detection_turn(view, name) for name in _names_to_find(things, rng)]
    # The first request shows the image.
    for turn, (request, answer) in enumerate(turns):
        dialogue.say([view, request] if turn == 0 else [request], [answer])
    return {"messages": dialogue.messages}


def _mostly_two(seed: int, index: int, split: str, rng: random.Random) -> Scene:
    """Scene number `index`; of those with one thing every second is skipped: there is nothing to
    choose in it."""
    scenes = (scene_at(seed, i, split) for i in count(index))
    return next(scene for scene in scenes if len(scene.things) > 1 or rng.random() < 0.5)


def _wide_question(scene: WideScene, rng: random.Random) -> tuple[str, str]:
    """A question about a wide scene; behind a verdict where it names a thing."""
    question, answer = ask_wide(scene, rng)
    named = [name for name in scene.present_things if question == f"Where is the {name}?"]
    return question, after(verdict(scene, *named) if named else "", answer)


def _names_to_find(things: list[str], rng: random.Random) -> list[str]:
    """Up to two of the things of a scene and one that it does not show, in any order."""
    names = rng.sample(things, min(2, len(things)))
    names.append(rng.choice([name for name in NAMES if name not in things]))
    return rng.sample(names, len(names))


def _detection_turn(view: View, name: str) -> tuple[str, str]:
    """Where a thing is, asked and answered by boxes behind a verdict."""
    boxes = view.boxes()
    answer = box_text(name, boxes) if any(thing == name for thing, _ in boxes) else absent(name)
    request = prompts.SEED_X_TASKS.detect_request(detect_phrase(name, boxes))
    return request, after(verdict(view.scene, name, all_things=True), answer)


def detect_phrase(name: str, boxes: Sequence[tuple[str, object]]) -> str:
    """`the tiger`, `the tigers`."""
    n_things = sum(thing == name for thing, _ in boxes)
    return f"the {plural(name) if n_things > 1 else name}"


def box_text(name: str, boxes: Sequence[tuple[str, Sequence[float]]]) -> str:
    """The boxes of a thing as words, row by row."""
    of_thing = [box for thing, box in boxes if thing == name]
    text = ""
    for corners in sorted(of_thing, key=lambda box: (round(2 * box[1]), box[0])):
        inside = [min(max(value, 0.0), 1.0) for value in corners]
        box = Box.from_corners(inside, (1, 1), GRID)
        text += BOX + "".join(map(location_token, (box.x, box.y, box.width, box.height))) + BOX_END
    return text


def _with_random_views(record: Record, rng: random.Random) -> Record:
    """Its users' images in any size; in any frame, too, where no image is drawn."""
    messages = record["messages"]
    framed = all(_is_text(message["content"]) for message in messages[1::2])
    for message in messages[::2]:
        parts = message["content"]
        for index, part in enumerate(parts):
            if not isinstance(part, str):
                parts[index] = any_view(part, rng, framed)
    return record


def _with_seed_x_prompts(record: Record, rng: random.Random) -> Record:
    """The requests as SEED-X's systems send them: descriptions are sentences, answers to questions
    short and in lower case; nothing but a description stands before a drawing."""
    request: list[Part] = []
    for message in record["messages"]:
        parts = message["content"]
        # Requests, then short answers, then all other answers without their opening.
        if message["role"] == "user":
            request = parts
            parts = [_request(part, rng) if isinstance(part, str) else part for part in parts]
        elif not _is_text(parts):
            openings = (prompts.DRAW_RESPONSE, prompts.EDIT_RESPONSE)
            parts = [part for part in parts if part not in openings]
        elif request[-1] not in DESCRIBE_REQUESTS:
            kept = (*ANSWERS, *REFUSALS.values())
            parts = [part if part in kept else normalise(part) for part in parts]
        message["content"] = parts
    return record


def _request(text: str, rng: random.Random) -> str:
    if text == prompts.DESCRIBE_PROMPT:
        return prompts.SEED_X_TASKS.describe if rng.random() < 0.8 else text
    before, after = prompts.DRAW_PROMPT.split("{caption}")
    if text.startswith(before) and text.endswith(after):
        return prompts.SEED_X_TASKS.draw_request(text[len(before) : len(text) - len(after)])
    return text.removesuffix(prompts.QA_SUFFIX)
