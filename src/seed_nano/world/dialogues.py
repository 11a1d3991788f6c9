"""Dialogues about scenes, turn by turn; every scene of theirs satisfies `allowed`.

A new kind of turn is a method of `Dialogue`; its wordings stand in vocabulary.yaml.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TypedDict

from seed_multimodal.language.prompts import (
    DESCRIBE_PROMPT,
    DRAW_PROMPT,
    DRAW_RESPONSE,
    EDIT_RESPONSE,
)
from seed_nano.world.scene import Scene, WideScene
from seed_nano.world.splits import Allowed, scene_where
from seed_nano.world.tasks import Edit, Question, after, ask_any, make_any_edit
from seed_nano.world.things import (
    BACKGROUND_PHRASES,
    BACKGROUNDS,
    NAMES,
    NUMBERS,
    STYLES,
    VOCABULARY,
    background_words,
)
from seed_nano.world.wide import View
from seed_nano.world.words import describe, noun_phrase, sentence

Part = str | Scene | WideScene | View

# Requests; the first of several is the one that systems send.
DESCRIBE_REQUESTS = (DESCRIBE_PROMPT, *VOCABULARY["describe"])
DRAW_REQUESTS = (DRAW_PROMPT, *VOCABULARY["draw"])
STORIES = 0.15  # share of the conversations that end with a story
UNKNOWN = "I do not know. I only know small scenes."
ANSWERS = {UNKNOWN, *(talk["answer"] for talk in VOCABULARY["small_talk"])}


class Message(TypedDict):
    """A turn of one side."""

    role: str
    content: list[Part]


class Dialogue:
    """Turns of user and assistant under construction."""

    def __init__(self, rng: random.Random, allowed: Allowed) -> None:
        self.rng = rng
        self.allowed = allowed
        self.messages: list[Message] = []

    def say(self, request: Iterable[Part], answer: Iterable[Part]) -> None:
        """One turn of each side."""
        self.messages.append({"role": "user", "content": list(request)})
        self.messages.append({"role": "assistant", "content": list(answer)})

    @property
    def scenes(self) -> list[Scene]:
        """All scenes so far; `it` means the last one."""
        parts = chain.from_iterable(message["content"] for message in self.messages)
        return [part for part in parts if isinstance(part, Scene)]

    # ---- turns

    def look(self, scene: Scene | None = None, request: str = "") -> None:
        """The description of a new image."""
        scene = scene or scene_where(self.rng, self.allowed)
        request = request or self.rng.choice(DESCRIBE_REQUESTS)
        self.say([scene, request], [sentence(describe(scene))])

    def drawing(self) -> None:
        """A drawing from a caption."""
        scene = scene_where(self.rng, self.allowed)
        caption = describe(scene, self.rng, background_first=False)
        answer = EDIT_RESPONSE if self.scenes else DRAW_RESPONSE  # as systems open a forced image
        self.say([self.rng.choice(DRAW_REQUESTS).format(caption=caption)], [answer, scene])

    def question(self, *images: Scene) -> None:
        """A question about a new image, or the last one."""
        question = ask_any((*self.scenes, *images)[-1], self.rng)
        self.ask(question, *images)

    def ask(self, question: Question, *images: Scene) -> None:
        """A question, answered by a sentence behind its verdict."""
        answer = after(question.verdict, sentence(question.answer))
        self.say([*images, question.question], [answer])

    def edit(self) -> None:
        """An edit of the last image."""
        while True:
            edit = make_any_edit(self.scenes[-1], self.rng)
            if self.allowed(edit.target):
                return self.say([sentence(edit.instruction)], self.edit_answer(edit))

    def back(self) -> None:
        """`Now the first picture again, but put it at night.`"""
        scenes = self.scenes
        first = scenes[0]
        new = self.rng.choice([name for name in BACKGROUNDS if name != first.background])
        target = first.with_changes(background=new)
        if len(scenes) < 2 or not self.allowed(target):
            return self.edit()
        change = Edit("background", background_words(new, self.rng), target)
        return self.say(
            [f"Now the first picture again, but {change.instruction}."], self.edit_answer(change)
        )

    def small(self, with_image: bool = True) -> None:
        """What people say, and the answer; after an image it is more often a question that this
        does not answer."""
        if self.rng.random() < (0.7 if with_image else 0.3):
            return self.say([self.rng.choice(VOCABULARY["unanswerable"])], [UNKNOWN])
        talk = self.rng.choice(VOCABULARY["small_talk"])
        return self.say([self.rng.choice(talk["asked"])], [talk["answer"]])

    def story(self, frames: int = 0) -> None:
        """A story of three or four images (0: either)."""
        pages = story(self.rng, self.allowed, frames)
        scene = pages[1][1]
        hero = noun_phrase(1, scene.things[0], scene.style if self.rng.random() < 0.5 else "")
        length = f" in {NUMBERS[len(pages)]} pictures" if self.rng.random() < 0.7 else ""
        request = f"Tell a story about {hero} and {noun_phrase(1, scene.things[1])}{length}."
        self.say([request], chain.from_iterable(pages))

    def converse(self) -> None:
        """Two to six turns that look, ask, draw, edit and chat, and refer to what was shown before;
        sometimes a story ends a short conversation."""
        self.rng.choice((self.drawing, self.look))()
        left = self.rng.randint(2, 6) - 1
        with_story = self.rng.random() < STORIES and left > 1
        turns = {
            self.question: 4,
            self.edit: 4,
            self.back: 2,
            self.drawing: 1,
            self.look: 2,
            self.small: 0.5,
        }
        for _ in range(min(left, 3) - 1 if with_story else left):
            self.one_of(turns)
        if with_story:
            self.story(3)

    def one_of(self, shares: Mapping[Callable[[], None], float]) -> None:
        """Add one of these turns, drawn by its share."""
        (turn,) = self.rng.choices([*shares], [*shares.values()])
        turn()

    # ---- answers

    def edit_answer(self, edit: Edit) -> Sequence[Part]:
        """The answer to an edit: mostly the new image in words first, behind a verdict where a
        thing is named, so that the model combines image and change in words and draws from them;
        else the opening of a forced image."""
        if self.rng.random() < (0.9 if edit.verdict else 0.75):
            return after(edit.verdict, sentence(describe(edit.target))), edit.target
        return EDIT_RESPONSE, edit.target


def story(rng: random.Random, allowed: Allowed, frames: int) -> list[tuple[str, Scene]]:
    """Three or four frames (0: either), a sentence and a scene each: the hero is somewhere, a
    friend joins, they move on."""
    wanted = frames or rng.randint(3, 4)
    while True:
        style = rng.choice(STYLES)
        (hero, friend) = rng.sample(NAMES, 2)
        (first, second) = rng.sample(BACKGROUNDS, 2)
        # Each frame changes one property of the frame before.
        alone = Scene(style, first, "left", (hero,), jitter=rng.randrange(2**31))
        together = alone.with_changes(layout="left of", things=(hero, friend), counts=(1, 1))
        elsewhere = together.with_changes(background=second)
        last = elsewhere.with_changes(layout="right", things=(friend,), counts=(1,))
        scenes = [alone, together, elsewhere, last][:wanted]
        if all(map(allowed, scenes)):
            break
    sentences = [
        f"{noun_phrase(1, hero, style)} is alone {BACKGROUND_PHRASES[first][0]}",
        f"then {noun_phrase(1, friend)} comes to the {hero}",
        f"together they are {BACKGROUND_PHRASES[second][0]}",
        f"the {hero} has gone and the {friend} stays",
    ]
    return [(sentence(text), scene) for text, scene in zip(sentences, scenes, strict=False)]
