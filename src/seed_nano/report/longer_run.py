"""Answers of several turns and pictures: conversations, examples in context, stories; and what all sections share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from seed_multimodal.evaluation.batched import Codes, Part
from seed_multimodal.evaluation.metrics import bootstrap
from seed_multimodal.language.tasks import answer_in
from seed_nano.report.judge import Judge
from seed_nano.report.samples import Samples
from seed_nano.report.tasks import Section, System, all_words, picture_words, scene_words, score
from seed_nano.world.dialogues import Message
from seed_nano.world.phrases import BACKGROUND_PHRASES
from seed_nano.world.requests import examples_request, story_request
from seed_nano.world.scene import Scene, render
from seed_nano.world.verdicts import VERDICT_END
from seed_nano.world.words import describe, normalise, some

SHORT, LONG = 96, 256
"""Most tokens of an answer with at most one picture, and of a story."""
Seen = list[str | Image.Image]
"""An answer as a reader sees it."""


class LongerRun:
    """The sections of a split whose answers hold several parts.

    Attributes:
        answers: every answer, for answers.json.gz.
        talks, examples, stories: what was seen, for the sheets.
    """

    def __init__(self, system: System, judge: Judge, samples: Samples) -> None:
        self.system, self.judge, self.samples = system, judge, samples
        self.answers: Section = {}
        self.talks: list[list[tuple[str, Seen]]] = []
        self.examples: list[Seen] = []
        self.stories: list[Seen] = []

    def longer_parts(self) -> dict[str, Callable[[], Section]]:
        """The sections that this split has material for."""
        samples = self.samples
        return {**({"conversation": self.conversations} if samples.conversations else {}),
                **({"examples": self.in_context} if samples.examples else {}),
                **({"story": self.tell} if samples.stories else {})}

    def conversations(self) -> Section:
        """Every turn: words exact, the picture's labels all right; after the true turns, and after the system's own."""
        talks = self.samples.conversations
        encoded = self._encode([part for talk in talks for message in talk for part in message.content])
        found: Section = {"n": len(talks)}
        for name, own in (("turns", False), ("own", True)):
            rows, hits, pictures = [], [], []
            seen = self._talk(talks, encoded, own)
            for row, (talk, answers) in enumerate(zip(talks, seen, strict=True)):
                for wanted, answer in zip(talk[1::2], answers, strict=True):
                    rows.append(row)
                    hits.append(self._same(answer, wanted.content))
                    pictures.append(any(isinstance(part, Scene) for part in wanted.content))
            right, drawn, talk_of = np.array(hits, dtype=bool), np.array(pictures, dtype=bool), np.array(rows)
            for part, chosen in (("", np.ones_like(drawn)), ("_words", ~drawn), ("_pictures", drawn)):
                found[name + part] = bootstrap(right[chosen], talk_of[chosen].tolist())
            self.talks = [[turn for message, answer in zip(talk[::2], answers, strict=True)
                           for turn in (("user", self.shown(message.content)), ("assistant", answer))]
                          for talk, answers in zip(talks, seen, strict=True)]
            self.answers[f"conversations_{name}"] = [[_plain(answer) for answer in answers] for answers in seen]
        scenes = [part for talk in talks for message in talk[1::2] for part in message.content
                  if isinstance(part, Scene)]
        return {**found, "ceiling": self._ceiling(scenes)}

    def _talk(self, talks: Sequence[Sequence[Message]], encoded: dict[Scene, Codes], own: bool) -> list[list[Seen]]:
        """The answers of all turns; later turns follow the true answers, or the system's `own`."""
        histories: list[list[tuple[str, list[Part]]]] = [[] for _ in talks]
        answers: list[list[list[Part]]] = [[] for _ in talks]
        for place in range(0, max(map(len, talks)), 2):
            now = [i for i, talk in enumerate(talks) if place < len(talk)]
            for i in now:
                histories[i].append(("user", _as_parts(talks[i][place].content, encoded)))
            for i, answer in zip(now, self.system.answer([histories[i] for i in now], SHORT), strict=True):
                answers[i].append(answer)
                true = _as_parts(talks[i][place + 1].content, encoded)
                histories[i].append(("assistant", (answer or [""]) if own else true))
        flat = iter(self._draw_answers([answer for row in answers for answer in row]))
        return [[next(flat) for _ in row] for row in answers]

    def in_context(self) -> Section:
        """In-context: two examples of a change, then a picture to change in the same way."""
        given, wanted = [scenes for scenes, _ in self.samples.examples], [scene for _, scene in self.samples.examples]
        encoded = self._encode([scene for row in given for scene in row])
        answers = self._draw_answers(self.system.answer(
            [[("user", examples_request([encoded[scene] for scene in row]))] for row in given], SHORT))
        made = [_only_picture(answer) for answer in answers]
        found = picture_words(self.judge, made)
        self.examples = [[*self.shown(row), picture or ""] for row, picture in zip(given, made, strict=True)]
        self.answers["examples"] = [{"wanted": describe(scene), "read": read}
                                    for scene, read in zip(wanted, found, strict=True)]
        return {"n": len(wanted), **score(found, all_words(wanted)), "ceiling": self._ceiling(wanted),
                "without_picture": made.count(None)}

    def tell(self) -> Section:
        """Every frame: its sentence is the story's, with a background of its own choice, and its picture shows it."""
        stories = self.samples.stories
        requests = [story_request(some(1, pages[1][1].things[0], pages[0][1].style), some(1, pages[1][1].things[1]),
                                  len(pages)) for pages in stories]
        answers = self._draw_answers(self.system.answer([[("user", [text])] for text in requests], LONG))
        rows, words, pictures = [], [], []
        for row, (pages, answer) in enumerate(zip(stories, answers, strict=True)):
            frames = _frames(answer)
            told = _as_told(pages, [text for text, _ in frames])
            read = picture_words(self.judge, [picture for _, picture in frames[: len(pages)]])
            for place, scene in enumerate(told):
                rows.append(row)
                words.append(scene is not None)
                pictures.append(scene is not None and place < len(read) and read[place] == scene_words(scene))
        self.stories = [[text, *answer] for text, answer in zip(requests, answers, strict=True)]
        self.answers["stories"] = [{"request": text, "answer": _plain(answer)}
                                   for text, answer in zip(requests, answers, strict=True)]
        return {"n": len(stories), "frames": bootstrap(pictures, rows), "sentences": bootstrap(words, rows),
                "ceiling": self._ceiling([scene for pages in stories for _, scene in pages])}

    def _draw_answers(self, answers: Sequence[Sequence[Part]]) -> list[Seen]:
        pictures = iter(self.system.pictures([part for row in answers for part in row if not isinstance(part, str)]))
        return [[part if isinstance(part, str) else next(pictures) for part in row] for row in answers]

    def _encode(self, parts: Sequence[Any]) -> dict[Scene, Codes]:
        scenes = list(dict.fromkeys(part for part in parts if isinstance(part, Scene)))
        return dict(zip(scenes, self.system.codes(self._render(scenes)).tolist(), strict=True))

    def shown(self, content: Sequence[str | Scene]) -> Seen:
        """Words and scenes as a reader sees them."""
        return [part if isinstance(part, str) else Image.fromarray(render(part, self.system.image_size))
                for part in content]

    def _same(self, answer: Seen, wanted: Sequence[str | Scene]) -> bool:
        """Whether texts are equal after normalisation, without verdicts, and pictures have all labels, part by part."""
        return len(answer) == len(wanted) and all(
            (isinstance(part, str) and _final(part) == _final(true)) if isinstance(true, str) else
            (not isinstance(part, str) and picture_words(self.judge, [part]) == [scene_words(true)])
            for part, true in zip(answer, wanted, strict=True))

    def _render(self, scenes: Sequence[Scene]) -> NDArray[np.uint8]:
        return np.stack([render(scene, self.system.image_size) for scene in scenes])

    def _ceiling(self, scenes: Sequence[Scene]) -> Any:
        """The judge's share of real pictures with every label right."""
        real = [Image.fromarray(picture) for picture in self._render(scenes)]
        return score(picture_words(self.judge, real), all_words(scenes))["all"]


def _final(text: str) -> str:
    return normalise(answer_in(text, VERDICT_END))


def _as_parts(content: Sequence[str | Scene], encoded: dict[Scene, Codes]) -> list[Part]:
    return [encoded[part] if isinstance(part, Scene) else part for part in content]


def _plain(answer: Seen) -> list[str]:
    return [part if isinstance(part, str) else "(picture)" for part in answer]


def _only_picture(answer: Seen) -> Image.Image | None:
    pictures = [part for part in answer if not isinstance(part, str)]
    return pictures[0] if len(pictures) == 1 else None


def _frames(answer: Seen) -> list[tuple[str, Image.Image]]:
    """Pictures with the text before each."""
    return [(answer[i - 1] if i and isinstance(answer[i - 1], str) else "", part)  # type: ignore[misc]
            for i, part in enumerate(answer) if not isinstance(part, str)]


def _as_told(pages: Sequence[tuple[str, Scene]], texts: Sequence[str]) -> list[Scene | None]:
    """The scenes that a system's sentences tell, None for a sentence that is not the story's.

    A request leaves the two backgrounds open: they are those that the first and the third sentence name.
    """
    told: list[Scene | None] = []
    background = ""
    for (sentence, scene), text in zip(pages, [*texts, *[""] * len(pages)], strict=False):
        true, said = normalise(sentence), normalise(text)
        phrase = BACKGROUND_PHRASES[scene.background][0]
        if true.endswith(phrase):
            start = true.removesuffix(phrase)
            background = next((name for name, phrases in BACKGROUND_PHRASES.items() if said == start + phrases[0]), "")
            told.append(scene.but(background=background) if background else None)
        else:
            told.append(scene.but(background=background) if background and said == true else None)
    return told
