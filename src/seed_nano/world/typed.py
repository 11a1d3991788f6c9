"""Requests as people type them: drawings, follow-ups, edits, and what cannot be done.

The wordings stand in vocabulary.yaml under `typed`. Texts of requests.yaml, which the report asks,
are in no record.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from seed_multimodal.language.prompts import DRAW_RESPONSE
from seed_nano.world.dialogues import Dialogue, Part
from seed_nano.world.scene import Scene
from seed_nano.world.splits import scene_where
from seed_nano.world.tasks import EDITS, Edit, absent, after, ask_any, make_edit, verdict
from seed_nano.world.things import (
    BACKGROUND_PHRASES,
    BACKGROUNDS,
    COLOURS,
    NAMES,
    NUMBERS,
    POSITION_PHRASES,
    STYLES,
    VOCABULARY,
    plural,
)
from seed_nano.world.words import describe, noun_phrase, sentence

TYPED = VOCABULARY["typed"]
REFUSALS: dict[str, str] = TYPED["refusals"]
REQUESTS = Path(__file__).with_name("requests.yaml")


def normalise_request(request: str) -> str:
    """The form in which requests are compared: case and the last punctuation do not count."""
    return request.lower().rstrip(".!?")


@functools.cache
def held_out_requests() -> frozenset[str]:
    """Texts of the report's list, as `normalise_request` writes them."""
    listed = yaml.safe_load(REQUESTS.read_text(encoding="utf-8"))
    return frozenset(normalise_request(row["asked"]) for rows in listed.values() for row in rows)


class TypedDialogue(Dialogue):
    """Turns in the words that people type."""

    def conversation(self) -> None:
        """One to four turns: without a picture at first, or about one; small talk between."""
        # 1. The first turn; more than half of the conversations begin without a picture.
        self.one_of(
            {
                self.typed_drawing: 30,
                self.unknown_drawing: 8,
                self.no_picture: 8,
                self.lonely_story: 3,
                self.typed_look: 6,
                self.shown_question: 8,
                self.shown_change: 29,
                self.typed_talk: 8,
            }
        )

        # 2. What follows.
        without_picture = {self.typed_drawing: 6, self.unknown_drawing: 1, self.no_picture: 1}
        about_picture = {
            self.typed_edit: 10,
            self.another: 3,
            self.impossible: 3,
            self.typed_drawing: 3,
            self.unknown_drawing: 1,
            self.typed_question: 2,
            self.typed_look: 1,
            self.typed_talk: 3,
        }
        for _ in range(self.rng.choice((0, 0, 1, 1, 2, 3))):
            if not self.scenes:
                self.one_of(without_picture)
                continue
            self.one_of(about_picture)

    # ---- without a picture

    def typed_drawing(self) -> None:
        """A drawing of a few words."""
        scene = scene_where(self.rng, self.allowed)
        self.say([self._draw_request(short_caption(scene, self.rng))], [DRAW_RESPONSE, scene])

    def unknown_drawing(self) -> None:
        """A drawing of something that is not among the things."""
        name = self.rng.choice(TYPED["unknown"])
        if self.rng.random() < 0.2:
            name = f"{self.rng.choice(TYPED['attributes'])} {name}"
        count = 2 if self.rng.random() < 0.1 else 1
        phrase = noun_phrase(count, name)
        if self.rng.random() < 0.25:
            phrase = self.rng.choice(
                (f"{phrase} and {self._known()}", f"{self._known()} and {phrase}")
            )
        if self.rng.random() < 0.15:
            phrase += f" {BACKGROUND_PHRASES[self.rng.choice(BACKGROUNDS)][0]}"
        self.say([self._draw_request(phrase)], [REFUSALS["draw"]])

    def no_picture(self) -> None:
        """A request about a picture, where none was shown."""
        if self.scenes:
            return self.impossible()
        name = self._name()
        request = self.rng.choice(TYPED["no picture"]).format(
            thing=noun_phrase(1, name),
            things=plural(name),
            the=f"the {name}",
            colour=self.rng.choice((*TYPED["colours"], *COLOURS)),
        )
        return self.say([self._typed(request)], [REFUSALS["picture"]])

    def lonely_story(self) -> None:
        """A story of one thing: it is somewhere, comes nearer, and is somewhere else."""
        rng = self.rng
        while True:
            (name,) = rng.sample(NAMES, 1)
            (first, second) = rng.sample(BACKGROUNDS, 2)
            style = rng.choice(STYLES)
            alone = Scene(style, first, "left", (name,), jitter=rng.randrange(2**31))
            near = alone.with_changes(layout="large")
            away = near.with_changes(background=second)
            if all(map(self.allowed, (alone, near, away))):
                break
        texts = (
            f"{noun_phrase(1, name, style)} is alone {BACKGROUND_PHRASES[first][0]}",
            f"then the {name} comes near",
            f"now the {name} is {BACKGROUND_PHRASES[second][0]}",
        )
        answer: list[Part] = []
        for text, scene in zip(texts, (alone, near, away), strict=True):
            answer += [sentence(text), scene]
        request = rng.choice(TYPED["story"]).format(noun_phrase(1, name))
        self.say([self._typed(request)], answer)

    # ---- about a picture

    def typed_look(self) -> None:
        """The description of a new picture."""
        scene = scene_where(self.rng, self.allowed)
        request = self._typed(self.rng.choice(TYPED["look"]))
        self.say([scene, request], [sentence(describe(scene))])

    def typed_talk(self) -> None:
        """Small talk with words around it."""
        talk = self.rng.choice(VOCABULARY["small_talk"])
        asked = self.rng.choice(talk["asked"]).rstrip(".!")
        if not asked.startswith("I "):
            asked = asked[0].lower() + asked[1:]
        self.say([self._typed(asked)], [talk["answer"]])

    def shown_question(self) -> None:
        """A question about a new picture."""
        self.typed_question(scene_where(self.rng, self.allowed))

    def typed_question(self, *images: Scene) -> None:
        """A question about a new picture, or the last one, with words around it."""
        scene = (*self.scenes, *images)[-1]
        question = ask_any(scene, self.rng)
        text = question.question[0].lower() + question.question[1:]
        self.ask(replace(question, question=self._typed(text)), *images)

    def shown_change(self) -> None:
        """A new picture with an edit, or with one that cannot be made."""
        scene = scene_where(self.rng, self.allowed)
        if self.rng.random() < 0.25:
            self.impossible(scene)
        else:
            self.typed_edit(scene)

    def typed_edit(self, *images: Scene) -> None:
        """An edit of a new picture, or of the last one."""
        scene = (*self.scenes, *images)[-1]
        while True:
            edit = make_edit(scene, self.rng.choice(EDITS), self.rng)
            if edit is not None and self.allowed(edit.target):
                break
        request = self._typed(edit_request(scene, edit, self.rng))
        self.say([*images, request], self.edit_answer(edit))

    def another(self) -> None:
        """The same things once more, otherwise drawn."""
        scene = self.scenes[-1]
        while True:
            target = scene.with_changes(
                style=self.rng.choice(STYLES),
                background=self.rng.choice(BACKGROUNDS),
                jitter=self.rng.randrange(2**31),
            )
            if self.allowed(target) and target.key != scene.key:
                break
        answer = self.edit_answer(Edit("another", "", target))
        self.say([self._typed(self.rng.choice(TYPED["another"]))], answer)

    def impossible(self, *images: Scene) -> None:
        """An edit that cannot be made: of a thing that is not there, or that nobody learned."""
        scene = (*self.scenes, *images)[-1]
        if self.rng.random() < 0.35:
            name = self._name(scene.things)
            wording = self.rng.choice((*TYPED["remove"], *TYPED["replace"]))
            request = wording.format(old=f"the {name}", new=self._known())
            answer = after(verdict(scene, name, all_things=True), sentence(absent(name)))
            return self.say([*images, self._typed(request)], [answer])
        thing = scene.things[0]
        name = plural(thing) if scene.counts[0] > 1 else thing
        request = self.rng.choice(TYPED["impossible"]).format(
            it=self.rng.choice(("it", f"the {name}")),
            colour=self.rng.choice(TYPED["colours"]),
            attribute=self.rng.choice(TYPED["attributes"]),
            unknown=self.rng.choice(TYPED["unknown"]),
        )
        return self.say([*images, self._typed(request)], [REFUSALS["edit"]])

    # ---- wordings

    def _name(self, without: Sequence[str] = ()) -> str:
        return self.rng.choice([name for name in NAMES if name not in without])

    def _known(self) -> str:
        return noun_phrase(1, self._name())

    def _draw_request(self, phrase: str) -> str:
        if self.rng.random() < 0.3:
            return self._typed(phrase)
        return self._typed(self.rng.choice(TYPED["draw"]).format(phrase))

    def _typed(self, wording: str) -> str:
        """A request with words around it, with or without capital and full stop."""
        rng = self.rng
        is_question = wording.endswith("?")
        ends = ("?", "?", "") if is_question else ("", "", ".", "!")
        while True:
            request = wording.rstrip("?")
            if rng.random() < 0.15:
                request = rng.choice(TYPED["openers"]) + request
            if rng.random() < 0.15:
                request += rng.choice(TYPED["closers"])
            if rng.random() < 0.5:
                request = request[0].upper() + request[1:]
            if normalise_request(request) not in held_out_requests():
                return request + rng.choice(ends)


def short_caption(scene: Scene, rng: random.Random) -> str:
    """What people say of a scene before they see it: mostly the things alone."""
    if rng.random() < 0.3:
        return describe(scene, rng, background_first=False)
    (name, count) = (scene.things[0], scene.counts[0])
    adjective = scene.style if rng.random() < 0.1 else ""
    if not adjective and rng.random() < 0.3:
        adjective = rng.choice(TYPED["attributes"])
    phrase = noun_phrase(count, name, adjective)
    if count == 1 and len(scene.things) == 1 and not adjective and rng.random() < 0.3:
        phrase = name
    if len(scene.things) == 2:
        phrase += f" and {noun_phrase(scene.counts[1], scene.things[1])}"
    if rng.random() < 0.25:
        phrase += f" {rng.choice(BACKGROUND_PHRASES[scene.background])}"
    return phrase


def edit_request(scene: Scene, edit: Edit, rng: random.Random) -> str:
    """An edit in the words that people type."""
    target = edit.target
    names = [
        f"the {plural(name) if count > 1 else name}"
        for name, count in zip(scene.things, scene.counts, strict=True)
    ]
    it = rng.choice(("it", names[0]))

    def worded(kind: str) -> str:
        wording: str = rng.choice(TYPED[kind])
        return wording

    if edit.kind in ("replace", "remove"):
        index = next(i for i, name in enumerate(scene.things) if name not in target.things)
        new = noun_phrase(scene.counts[index], edit.value) if edit.value else ""
        return worded(edit.kind).format(old=names[index], new=new)
    if edit.kind == "add":
        side = "left" if target.things[0] == edit.value else "right"
        spot = rng.choice(POSITION_PHRASES[side])
        return worded("add").format(new=noun_phrase(1, edit.value), spot=spot)
    if edit.kind == "swap":
        first, second = rng.sample(names, 2)
        return worded("swap").format(first=first, second=second)
    if edit.kind == "move":
        return worded("move").format(it=it, spot=target.layout)
    if edit.kind == "size":
        return worded("bigger" if target.layout == "large" else "smaller").format(it=it)
    if edit.kind == "background":
        kind = "background" if edit.value in COLOURS else "place"
        phrase = edit.value if kind == "background" else rng.choice(BACKGROUND_PHRASES[edit.value])
        return worded(kind).format(phrase)
    if edit.kind == "style":
        return worded("style").format(edit.value)
    count = target.counts[0]
    if rng.random() < 0.5:
        return worded("of them").format(NUMBERS[count])
    return worded("number").format(noun_phrase(count, scene.things[0]))
