"""Requests as people type them: drawings, follow-ups, edits, and what cannot be done.

The wordings stand in vocabulary.yaml under `typed`. Texts of requests.yaml and everyday.yaml, which
the report asks, are in no record.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase

import yaml

from seed_multimodal.language.prompts import DRAW_RESPONSE
from seed_nano.world.dialogues import UNKNOWN, Dialogue, Part
from seed_nano.world.scene import Scene
from seed_nano.world.splits import held_out_compositions, scene_where
from seed_nano.world.tasks import (
    EDITS,
    SPOTS,
    Edit,
    Question,
    absent,
    after,
    ask_any,
    make_edit,
    noun_phrases,
    other_thing,
    verdict,
)
from seed_nano.world.things import (
    BACKGROUND_PHRASES,
    BACKGROUNDS,
    COLOURS,
    NAMES,
    NUMBERS,
    POSITION_PHRASES,
    RELATIONS,
    STYLES,
    VOCABULARY,
    plural,
)
from seed_nano.world.words import TURNED, describe, noun_phrase, sentence

TYPED = VOCABULARY["typed"]
REFUSALS: dict[str, str] = TYPED["refusals"]
NOTHING_TO_DRAW = "What shall I draw?"
ARTICLES = re.compile(r"\b(?:an?|the) (?=\w)")
REQUESTS = Path(__file__).with_name("requests.yaml")
EVERYDAY = Path(__file__).with_name("everyday.yaml")


def normalise_request(request: str) -> str:
    """The form in which requests are compared: case and the last punctuation do not count."""
    return request.lower().rstrip(".!?")


@functools.cache
def held_out_requests() -> frozenset[str]:
    """Texts of the report's lists, as `normalise_request` writes them."""
    texts: set[str] = set()
    for file in (REQUESTS, EVERYDAY):
        for rows in yaml.safe_load(file.read_text(encoding="utf-8")).values():
            texts.update(normalise_request(row["asked"]) for row in rows)
    return frozenset(texts)


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
                self.shown_question: 16,
                self.shown_change: 29,
                self.typed_talk: 8,
                self.unwanted: 14,
                self.not_for_nano: 10,
                self.introduction: 3,
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
            self.typed_question: 4,
            self.typed_look: 1,
            self.typed_talk: 3,
            self.one_more_or_less: 2,
            self.meant: 2,
            self.remembered: 3,
            self.unwanted: 1,
            self.not_for_nano: 1,
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

    def unwanted(self) -> None:
        """A drawing with something that it should not show, or none."""
        if self.rng.random() < 0.75:
            return self.drawing_without()
        name = self._name()
        wording = self.rng.choice(TYPED["nothing"])
        request = wording.format(thing=noun_phrase(1, name), things=plural(name))
        return self.say([self._typed(request)], [NOTHING_TO_DRAW])

    def drawing_without(self) -> None:
        """A drawing with something that it should not show."""
        scene = scene_where(self.rng, self.allowed)
        phrase = things_phrase(scene, self.rng)
        if self.rng.random() < 0.5:
            other = self.rng.choice([name for name in BACKGROUNDS if name != scene.background])
            wording = self.rng.choice(TYPED["not there"])
            request = wording.format(phrase, no=self.rng.choice(BACKGROUND_PHRASES[other]))
        else:
            name = self._name(scene.things)
            no = self.rng.choice((noun_phrase(1, name), plural(name)))
            request = self.rng.choice(TYPED["not with"]).format(phrase, no=no)
        if self.rng.random() < 0.5:
            request = self.rng.choice(("draw", "paint", "show me", "make")) + " " + request
        self.say([self._typed(request)], [DRAW_RESPONSE, scene])

    def not_for_nano(self) -> None:
        """What nobody can do with scenes: general questions, too many things, videos."""
        rng = self.rng
        kind = rng.choice(("general", "general", "too many", "other than scenes", "letters"))
        if kind == "letters":
            words = ("".join(rng.sample(ascii_lowercase, rng.randint(3, 7))) for _ in range(2))
            return self.say([" ".join(words)], [UNKNOWN])
        (thing, thing2, thing3) = rng.sample(NAMES, 3)
        while held_out_compositions((thing2, thing3), (1, 1), None, None):
            thing3 = self._name((thing, thing2))
        request = rng.choice(TYPED[kind]).format(
            number=rng.choice(TYPED["large numbers"]),
            thing=noun_phrase(1, thing),
            thing2=noun_phrase(1, thing2),
            thing3=noun_phrase(1, thing3),
            things=plural(thing),
        )
        answers = {"general": UNKNOWN, "too many": REFUSALS["many"]}
        return self.say([self._typed(request)], [answers.get(kind, REFUSALS["draw"])])

    def introduction(self) -> None:
        """Somebody says his name, and may ask for a drawing at once."""
        name = self.rng.choice(TYPED["people"])
        if self.rng.random() < 0.3:
            name = name.lower()
        request = self.rng.choice(TYPED["introduced"]).format(name)
        if self.rng.random() < 0.7:
            return self.say([request], [VOCABULARY["small_talk"][0]["answer"]])
        scene = scene_where(self.rng, self.allowed)
        drawing = self.rng.choice(TYPED["draw"]).format(short_caption(scene, self.rng))
        return self.say([f"{request}, {drawing}"], [DRAW_RESPONSE, scene])

    # ---- about a picture

    def one_more_or_less(self) -> None:
        """A number of things that changes by one, or to one."""
        scene = self.scenes[-1]
        count = scene.counts[0]
        wanted = {"one more": count + 1, "one less": count - 1, "only one": 1}
        kind = self.rng.choice([*wanted])
        number = wanted[kind]
        if len(scene.things) > 1 or number == count or not 1 <= number <= max(NUMBERS):
            return self.typed_edit()
        target = scene.with_changes(layout="many" if number > 1 else "large", counts=(number,))
        if not self.allowed(target):
            return self.typed_edit()
        thing = scene.things[0]
        request = self.rng.choice(TYPED[kind]).format(thing=thing, things=plural(thing))
        return self.say([self._typed(request)], self.edit_answer(Edit("number", "", target)))

    def meant(self) -> None:
        """Another thing than the one that was drawn."""
        scene = self.scenes[-1]
        new = self._name(scene.things)
        if len(scene.things) > 1:
            return self.typed_edit()
        target = scene.with_changes(things=(new,))
        if not self.allowed(target):
            return self.typed_edit()
        request = self.rng.choice(TYPED["meant"]).format(
            new=noun_phrase(scene.counts[0], new), old=noun_phrases(scene)
        )
        return self.say([self._typed(request)], self.edit_answer(Edit("replace", "", target)))

    def remembered(self) -> None:
        """What the first turn asked for and drew."""
        first = self.messages[0]["content"]
        drawn = [part for part in self.messages[1]["content"] if isinstance(part, Scene)]
        if not drawn or not all(isinstance(part, str) for part in first):
            return self.typed_look()
        kind = self.rng.choice(("asked for", "asked for", "drawn", "asked for it"))
        name = self.rng.choice((drawn[0].things[0], self._name(drawn[0].things)))
        request = self.rng.choice(TYPED[kind]).format(noun_phrase(1, name))
        answer = noun_phrases(drawn[0])
        if kind == "asked for it":
            answer = "yes" if name in drawn[0].things else "no"
        return self.say([self._typed(request)], [sentence(answer)])

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
        if self.rng.random() < 0.1:
            request = self.rng.choice(TYPED["no colour"]).format(scene.things[0])
            return self.say([*images, self._typed(request)], [UNKNOWN])
        question = everyday_question(scene, self.rng)
        text = question.question[0].lower() + question.question[1:]
        return self.ask(replace(question, question=self._typed(text)), *images)

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
            if rng.random() < 0.15:
                request = ARTICLES.sub("", request)
            if rng.random() < 0.5:
                request = request[0].upper() + request[1:]
            if normalise_request(request) not in held_out_requests():
                return request + rng.choice(ends)


def everyday_question(scene: Scene, rng: random.Random) -> Question:
    """A question as people type it, of a kind that the scene can answer."""
    makers = (_reworded, _beside, _whole, _total, _either, _either)
    questions = (maker(scene, rng) for maker in rng.sample(makers, len(makers)))
    return next(question for question in questions if question is not None)


def _reworded(scene: Scene, rng: random.Random) -> Question:
    """A question of the records, in half of the cases in other words."""
    question = ask_any(scene, rng)
    wordings = TYPED["questions"].get(question.kind)
    if not wordings or rng.random() < 0.5:
        return question
    thing = question.named.split(" ", 1)[-1] if question.kind == "yesno" else question.named
    text = rng.choice(wordings).format(question.named, thing=thing, things=plural(thing))
    return replace(question, question=text)


def _beside(scene: Scene, rng: random.Random) -> Question | None:
    """`What is below the penguin?`"""
    if scene.layout not in ("left of", "above"):
        return None
    index = rng.randrange(2)
    thing = scene.things[index]
    # The first thing is left of the second one: what is right of the first is the second.
    relation = scene.layout if index else TURNED[scene.layout]
    place = f"{rng.choice((*RELATIONS[relation], 'next to'))} the {thing}"
    answer = noun_phrase(1, scene.things[1 - index])
    before = verdict(scene, thing, all_things=True)
    return Question("beside", rng.choice(TYPED["beside"]).format(place), answer, before)


def _whole(scene: Scene, rng: random.Random) -> Question:
    return Question("whole", rng.choice(TYPED["whole"]), noun_phrases(scene))


def _total(scene: Scene, rng: random.Random) -> Question:
    count = sum(scene.counts)
    return Question("total", rng.choice(TYPED["total"]), NUMBERS.get(count, "one"))


def _either(scene: Scene, rng: random.Random) -> Question | None:
    """A question with two answers to choose from."""
    kind = rng.choice([*TYPED["either"]])
    before = ""
    thing = scene.things[0]
    if kind == "thing":
        answer = noun_phrase(scene.counts[0], thing)
        other = noun_phrase(scene.counts[0], other_thing(scene, rng))
    elif kind == "place":
        spots = SPOTS.get(scene.layout, ())
        if len(spots) != 2:
            return None
        index = rng.randrange(2)
        (thing, answer, other) = (scene.things[index], spots[index], spots[1 - index])
        before = verdict(scene, thing)
    elif kind == "count":
        answer = NUMBERS.get(scene.counts[0], "one")
        others = [
            NUMBERS.get(number, "one")
            for number in (1, *NUMBERS)
            if not held_out_compositions((thing,), (number,), None, None)
        ]
        other = rng.choice([name for name in others if name != answer] or ["five"])
        before = verdict(scene, thing) if len(scene.things) > 1 else ""
    elif kind == "day":
        time = "night" if scene.background == "night" else "day"
        return Question(kind, rng.choice(TYPED["either"][kind]), time)
    else:
        values = STYLES if kind == "style" else BACKGROUNDS
        answer = getattr(scene, kind)
        other = rng.choice([value for value in values if value != answer])
    pair = [_shortened(answer, rng), _shortened(other, rng)] if kind == "place" else [answer, other]
    wording = rng.choice(TYPED["either"][kind])
    text = wording.format(*rng.sample(pair, 2), thing=thing, things=plural(thing))
    return Question(kind, text, answer, before)


def _shortened(spot: str, rng: random.Random) -> str:
    """`on the left`, `left`; `at the top`, `above`."""
    last = spot.split()[-1]
    return rng.choice((spot, {"top": "above", "bottom": "below"}.get(last, last)))


def things_phrase(scene: Scene, rng: random.Random) -> str:
    """Its things alone, with their relation in some cases."""
    if scene.layout in RELATIONS and rng.random() < 0.3:
        (first, second) = map(noun_phrase, scene.counts, scene.things)
        relation = rng.choice((*RELATIONS[scene.layout], "next to"))
        return f"{first} {relation} {second}"
    return noun_phrases(scene)


def short_caption(scene: Scene, rng: random.Random) -> str:
    """What people say of a scene before they see it: mostly the things alone."""
    if rng.random() < 0.3:
        return describe(scene, rng, background_first=False)
    (name, count) = (scene.things[0], scene.counts[0])
    adjective = scene.style if rng.random() < 0.1 else ""
    if not adjective and rng.random() < 0.3:
        adjective = rng.choice(TYPED["attributes"])
    phrase = noun_phrase(count, name, adjective)
    if count == 1 and len(scene.things) == 1 and not adjective and rng.random() < 0.4:
        phrase = rng.choice((name, name, name, f"one {name}", f"the {name}"))
    if len(scene.things) == 2:
        joined = "next to" if scene.layout == "left of" and rng.random() < 0.2 else "and"
        phrase += f" {joined} {noun_phrase(scene.counts[1], scene.things[1])}"
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
