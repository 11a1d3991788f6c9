"""Conversations about scenes that refer back, and stories; every scene of theirs satisfies
`allowed`."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import chain

from seed_multimodal.language.prompts import (
    DESCRIBE_PROMPT,
    DRAW_PROMPT,
    DRAW_RESPONSE,
    EDIT_RESPONSE,
)
from seed_nano.world.scene import Scene
from seed_nano.world.splits import Allowed, scene_where
from seed_nano.world.tasks import after, ask_any, make_any_edit
from seed_nano.world.things import (
    BACKGROUND_PHRASES,
    BACKGROUNDS,
    NAMES,
    NUMBERS,
    STYLES,
    VOCABULARY,
    background_words,
)
from seed_nano.world.words import describe, noun_phrase, sentence

Part = str | Scene

# Requests; the first of several is the one that systems send.
DESCRIBE_REQUESTS = (DESCRIBE_PROMPT, *VOCABULARY["describe"])
DRAW_REQUESTS = (DRAW_PROMPT, *VOCABULARY["draw"])
STORIES = 0.15  # share of the conversations that end with a story
UNKNOWN = "I do not know. I only know small scenes."
ANSWERS = {UNKNOWN, *(talk["answer"] for talk in VOCABULARY["small_talk"])}


@dataclass
class ConversationBuilder:
    """A conversation under construction; `messages` of user and assistant by turns; `it` means the
    last scene."""

    rng: random.Random
    allowed: Allowed
    messages: list[list[Part]] = field(default_factory=list)
    scenes: list[Scene] = field(default_factory=list)

    def say(self, request: list[Part], answer: list[Part]) -> None:
        """One turn of each side."""
        self.messages += [request, answer]
        self.scenes += [part for part in (*request, *answer) if isinstance(part, Scene)]

    def draw(self) -> None:
        """A drawing from a caption."""
        scene = scene_where(self.rng, self.allowed)
        caption = describe(scene, self.rng, background_first=False)
        answer = EDIT_RESPONSE if self.scenes else DRAW_RESPONSE  # as systems open a forced image
        self.say([self.rng.choice(DRAW_REQUESTS).format(caption=caption)], [answer, scene])

    def look(self) -> None:
        """The description of a new image."""
        scene = scene_where(self.rng, self.allowed)
        self.say([scene, self.rng.choice(DESCRIBE_REQUESTS)], [sentence(describe(scene))])

    def question(self) -> None:
        """A question about the last image."""
        question = ask_any(self.scenes[-1], self.rng)
        self.say([question.question], [after(question.verdict, sentence(question.answer))])

    def edit(self) -> None:
        """An edit of the last image."""
        while True:
            edit = make_any_edit(self.scenes[-1], self.rng)
            if self.allowed(edit.target):
                return self.say(
                    [sentence(edit.instruction)], edit_answer(edit.target, self.rng, edit.verdict)
                )

    def back(self) -> None:
        """`Now the first picture again, but put it at night.`"""
        first = self.scenes[0]
        new = self.rng.choice([name for name in BACKGROUNDS if name != first.background])
        target = first.with_changes(background=new)
        if len(self.scenes) < 2 or not self.allowed(target):
            return self.edit()
        change = background_words(new, self.rng)
        return self.say(
            [f"Now the first picture again, but {change}."], edit_answer(target, self.rng)
        )

    def small(self) -> None:
        """Small talk."""
        request, answer = small_talk(self.rng, True)
        self.say([request], [answer])

    def story(self) -> None:
        """A story of three images."""
        pages = story(self.rng, self.allowed, 3)
        self.say([story_request(pages, self.rng)], list(chain.from_iterable(pages)))


def small_talk(rng: random.Random, with_image: bool) -> tuple[str, str]:
    """What people say, and the answer; `shown`: with an image, where it is more often a question
    that it cannot answer."""
    if rng.random() < (0.7 if with_image else 0.3):
        return rng.choice(VOCABULARY["unanswerable"]), UNKNOWN
    talk = rng.choice(VOCABULARY["small_talk"])
    return rng.choice(talk["asked"]), talk["answer"]


def edit_answer(scene: Scene, rng: random.Random, verdict: str = "") -> list[Part]:
    """The answer to an edit: mostly the new image in words first, behind a verdict where a thing is
    named, so that the model combines image and change in words and draws from them; else the
    opening of a forced image."""
    in_words = rng.random() < (0.9 if verdict else 0.75)
    return [after(verdict, sentence(describe(scene))) if in_words else EDIT_RESPONSE, scene]


def conversation(rng: random.Random, allowed: Allowed) -> list[list[Part]]:
    """Messages of two to six turns that look, ask, draw, edit and chat, and refer to what was shown
    before; sometimes a story ends a short one."""
    talk = ConversationBuilder(rng, allowed)
    rng.choice((talk.draw, talk.look))()
    left = rng.randint(2, 6) - 1
    with_story = rng.random() < STORIES and left > 1
    turns = (talk.question, talk.edit, talk.back, talk.draw, talk.look, talk.small)
    for _ in range(min(left, 3) - 1 if with_story else left):
        rng.choices(turns, (4, 4, 2, 1, 2, 0.5))[0]()
    if with_story:
        talk.story()
    return talk.messages


def story(rng: random.Random, allowed: Allowed, frames: int = 0) -> list[tuple[str, Scene]]:
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


def story_request(pages: list[tuple[str, Scene]], rng: random.Random) -> str:
    """`Tell a story about a noto dog and a cat in three pictures.`"""
    scene = pages[1][1]
    hero = noun_phrase(1, scene.things[0], scene.style if rng.random() < 0.5 else "")
    length = f" in {NUMBERS[len(pages)]} pictures" if rng.random() < 0.7 else ""
    return f"Tell a story about {hero} and {noun_phrase(1, scene.things[1])}{length}."
