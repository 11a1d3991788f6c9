"""Longer samples made of scenes: conversations that refer back, examples in context, stories, interleaved documents.

Every maker takes a random source and gives messages or a document whose scenes are all of the split that is asked for
(a scene that is held out in any other way never occurs).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from seed_multimodal.language.tasks import DRAW_RESPONSE, EDIT_RESPONSE
from seed_nano.world.edits import Edit, background_words, make_any_edit, make_edit
from seed_nano.world.phrases import BACKGROUND_PHRASES, NUMBERS
from seed_nano.world.questions import ask_any
from seed_nano.world.requests import DESCRIBE_REQUESTS, DRAW_REQUESTS, story_request
from seed_nano.world.scene import Scene
from seed_nano.world.splits import draw_scene, held_out
from seed_nano.world.talk import small_talk
from seed_nano.world.things import BACKGROUNDS, NAMES, STYLES, THINGS
from seed_nano.world.verdicts import after
from seed_nano.world.words import describe, some

Part = str | Scene
IN_CONTEXT = ("background", "style", "replace", "size", "number")
"""Kinds of edits that examples can show."""
STORIES = 0.15  # share of the conversations that end with a story
LETTERS = sorted({name[0] for name in NAMES})


@dataclass
class Message:
    """`role`: user or assistant; `content`: words and scenes in order."""

    role: str
    content: list[Part]


Allowed = Callable[[Scene], bool]


def trainable(scene: Scene) -> bool:
    """Whether a scene may be trained on."""
    return not held_out(scene)


@dataclass
class Talk:
    """A conversation while it is made: its messages, its pictures in order, the picture that `it` means."""

    shake: random.Random
    allowed: Allowed
    messages: list[Message] = field(default_factory=list)
    scenes: list[Scene] = field(default_factory=list)

    def say(self, asked: list[Part], answered: list[Part]) -> None:
        """One turn of each side."""
        self.messages += [Message("user", asked), Message("assistant", answered)]
        self.scenes += [part for part in (*asked, *answered) if isinstance(part, Scene)]

    def edit(self, asked: str, scene: Scene, verdict: str = "") -> None:
        """A turn that is answered with a changed picture."""
        self.say([asked], edited(scene, self.shake, verdict))

    @property
    def now(self) -> Scene:
        """The picture shown last."""
        return self.scenes[-1]

    def scene(self) -> Scene:
        """A fresh scene of the split."""
        return scene_where(self.shake, self.allowed)


def scene_where(shake: random.Random, allowed: Allowed) -> Scene:
    """A scene that may be used."""
    while True:
        scene = draw_scene(shake)
        if allowed(scene):
            return scene


def edit_where(scene: Scene, shake: random.Random, allowed: Allowed) -> Edit:
    """An edit whose target may be used."""
    while True:
        edit = make_any_edit(scene, shake)
        if allowed(edit.target):
            return edit


def sentence(words: str) -> str:
    """A clause as a sentence of its own: capital and full stop."""
    return f"{words[0].upper()}{words[1:]}."


def edited(scene: Scene, shake: random.Random, verdict: str = "") -> list[Part]:
    """The answer to an edit: mostly the new picture in words first, behind a verdict where a thing is named, so that
    what is read and what is to change are put together in words and drawn from them; else what systems open a forced
    one with."""
    words = shake.random() < (0.9 if verdict else 0.75)
    return [after(verdict, sentence(describe(scene))) if words else EDIT_RESPONSE, scene]


def _draw(talk: Talk) -> None:
    scene = talk.scene()
    words = describe(scene, talk.shake, background_first=False)
    answer = EDIT_RESPONSE if talk.scenes else DRAW_RESPONSE  # as systems open a picture that is forced
    talk.say([talk.shake.choice(DRAW_REQUESTS).format(caption=words)], [answer, scene])


def _look(talk: Talk) -> None:
    scene = talk.scene()
    talk.say([scene, talk.shake.choice(DESCRIBE_REQUESTS)], [sentence(describe(scene))])


def _question(talk: Talk) -> None:
    question = ask_any(talk.now, talk.shake)
    talk.say([question.question], [after(question.verdict, sentence(question.answer))])


def _edit(talk: Talk) -> None:
    edit = edit_where(talk.now, talk.shake, talk.allowed)
    talk.edit(sentence(edit.instruction), edit.target, edit.verdict)


def _small(talk: Talk) -> None:
    asked, answer = small_talk(talk.shake, True)
    talk.say([asked], [answer])


def _story(talk: Talk) -> None:
    pages = story(talk.shake, talk.allowed, 3)
    talk.say([story_asked(pages, talk.shake)], [part for page in pages for part in page])


def _back(talk: Talk) -> None:
    """`Now the first picture again, at night.`"""
    first, shake = talk.scenes[0], talk.shake
    new = shake.choice([name for name in BACKGROUNDS if name != first.background])
    target = first.but(background=new)
    if len(talk.scenes) < 2 or not talk.allowed(target):
        return _edit(talk)
    words = background_words(new, shake)
    return talk.edit(f"Now the first picture again, but {words}.", target)


def conversation(shake: random.Random, allowed: Allowed = trainable, turns: int = 0,
                 stories: bool = False) -> list[Message]:
    """Two to six turns that look, ask, draw and edit, and refer to what was shown before; with `stories` also small
    talk, and sometimes a story at the end of a short one."""
    talk = Talk(shake, allowed)
    shake.choice((_draw, _look))(talk)
    left = (turns or shake.randint(2, 6)) - 1
    with_story = stories and shake.random() < STORIES and left > 1
    for _ in range(min(left, 3) - 1 if with_story else left):
        kinds = (_question, _edit, _back, _draw, _look, _small)
        shake.choices(kinds, (4, 4, 2, 1, 2, 0.5 if stories else 0))[0](talk)
    if with_story:
        _story(talk)
    return talk.messages


def in_context(shake: random.Random, allowed: Allowed = trainable) -> tuple[list[Scene], Scene]:
    """Two examples of one change (before, after, before, after) and a third scene; then the scene that answers."""
    while True:
        kind, value = shake.choice(IN_CONTEXT), ""
        scenes: list[Scene] = []
        while len(scenes) < 6:
            scene = scene_where(shake, allowed)
            edit = make_edit(scene, kind, shake, value)
            one_reading = len(scene.things) == 1 and (kind != "size" or not scenes or scene.layout == scenes[0].layout)
            if edit is None or not one_reading or not allowed(edit.target):
                continue
            scenes += [scene, edit.target]
            value = edit.value
        return scenes[:5], scenes[5]


def story(shake: random.Random, allowed: Allowed = trainable, frames: int = 0) -> list[tuple[str, Scene]]:
    """Three or four frames, a sentence and a scene each: somebody is somewhere, somebody joins, they go on."""
    wanted = frames or shake.randint(3, 4)
    while True:
        style, (hero, friend), (first, second) = (
            shake.choice(STYLES), shake.sample(NAMES, 2), shake.sample(BACKGROUNDS, 2))
        alone = Scene(style, first, "left", (hero,), jitter=shake.randrange(2**31))
        together = alone.but(layout="left of", things=(hero, friend), counts=(1, 1))
        elsewhere = together.but(background=second)
        last = elsewhere.but(layout="right", things=(friend,), counts=(1,))
        scenes = [alone, together, elsewhere, last][:wanted]
        if all(map(allowed, scenes)):
            break
    sentences = [
        f"{some(1, hero, style)} is alone {BACKGROUND_PHRASES[first][0]}",
        f"then {some(1, friend)} comes to the {hero}",
        f"together they are {BACKGROUND_PHRASES[second][0]}", f"the {hero} has gone and the {friend} stays",
    ]
    return [(sentence(words), scene) for words, scene in zip(sentences, scenes, strict=False)]


def story_asked(pages: list[tuple[str, Scene]], shake: random.Random) -> str:
    """A request for a story."""
    together = pages[1][1]
    hero, friend = (some(1, name, style) for name, style in
                    zip(together.things, (together.style if shake.random() < 0.5 else "", ""), strict=True))
    return story_request(hero, friend, len(pages) if shake.random() < 0.7 else 0)


def document(shake: random.Random, allowed: Allowed = trainable) -> list[tuple[str, Scene]]:
    """An interleaved document: three letters (`A is for ant.`) or a thing counted (`Two ants.`), with a scene each."""
    def page(words: str, name: str, count: int = 1) -> tuple[str, Scene]:
        layout = "many" if count > 1 else "large"
        return words, Scene(style, background, layout, (name,), (count,), jitter)

    while True:
        style, background, jitter = shake.choice(STYLES), shake.choice(BACKGROUNDS), shake.randrange(2**31)
        if shake.random() < 0.5:
            start = shake.randrange(len(LETTERS) - 2)
            names = [shake.choice([n for n in NAMES if n[0] == letter]) for letter in LETTERS[start:start + 3]]
            pages = [page(f"{name[0].upper()} is for {name}.", name) for name in names]
        else:
            name = shake.choice(NAMES)
            pages = [page(f"One {name}.", name)] + [
                page(f"{word.capitalize()} {THINGS[name].plural}.", name, count) for count, word in NUMBERS.items()]
        if all(allowed(scene) for _, scene in pages):
            return pages
