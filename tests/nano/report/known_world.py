"""A system and a judge that know nano's scenes by heart, for metrics whose right value is known; and a small world."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from seed_nano.report.judge import JudgeConfig
from seed_nano.report.samples import Samples
from seed_nano.report.sizes import REPORTED, questions
from seed_nano.world.dialogues import Message
from seed_nano.world.requests import examples_request, story_request
from seed_nano.world.scene import Scene, render
from seed_nano.world.targets import JUDGED, label_tensor
from seed_nano.world.words import describe, some

Part = str | list[int]


class KnowingJudge:
    """Reads exactly the pictures of scenes that it was shown; any other is a white large dog to it."""

    def __init__(self) -> None:
        self.config = JudgeConfig()
        self.scenes: dict[bytes, Scene] = {}

    def learn(self, scenes: Sequence[Scene]) -> list[bytes]:
        names = [render(scene).tobytes() for scene in scenes]
        self.scenes.update(zip(names, scenes, strict=True))
        return names

    def labels(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        unknown = Scene("noto", "white", "large", ("dog",))
        return label_tensor([self.scenes.get(np.asarray(p).tobytes(), unknown) for p in pictures], JUDGED)

    def embed_images(self, pictures: Sequence[Image.Image] | np.ndarray) -> torch.Tensor:
        pixels = torch.stack([torch.from_numpy(np.array(p)).float().flatten() for p in pictures])
        return F.normalize(pixels - 128, dim=1)


class Oracle:
    """Answers everything right: the code of a picture is its number among the scenes it knows, in base 8."""

    codebook_size, section, image_size, length = 8, 8, 64, 32

    def __init__(self, judge: KnowingJudge, samples: Samples) -> None:
        self.known: dict[bytes, int] = {}
        self.scenes: list[Scene] = []
        self.after: dict[tuple[Scene, str], Scene] = {}
        self.truths: dict[tuple[Scene, str], str] = {}
        self.replies: dict[str, list[Part]] = {}
        talk = [part for one in samples.conversations for m in one for part in m.content if isinstance(part, Scene)]
        changes = [scene for row, answer in samples.examples for scene in (*row, answer)]
        pages = [scene for story in samples.stories for _, scene in story]
        edits = [scene for before, edit in samples.edits for scene in (before, edit.target)]
        for scene in (*samples.scenes, *edits, *talk, *changes, *pages):
            name = judge.learn([scene])[0]
            if name not in self.known:
                self.known[name] = len(self.scenes)
                self.scenes.append(scene)
        for scene in samples.scenes[: samples.sizes.rungs]:
            self.known |= {render(scene, size).tobytes(): self.known[render(scene).tobytes()] for size in REPORTED}
            self.truths |= {(scene, question.question): question.answer for question in questions(scene)}
        for scene, edit in samples.edits:
            self.after[scene, edit.instruction] = edit.target
        for row, question in samples.questions:
            self.truths[samples.scenes[row], question.question] = question.answer
        for messages in samples.conversations:
            for place in range(1, len(messages), 2):
                self.replies[self._key([(m.role, self._parts(m)) for m in messages[:place]])] = self._parts(
                    messages[place])
        for row, answer in samples.examples:
            asked = examples_request([self._write(scene) for scene in row])
            self.replies[self._key([("user", asked)])] = ["Here it is.", self._write(answer)]
        for story in samples.stories:
            hero, friend = story[1][1].things
            request = story_request(some(1, hero, story[0][1].style), some(1, friend), len(story))
            self.replies[self._key([("user", [request])])] = [
                part for text, scene in story for part in (text, self._write(scene))]

    @staticmethod
    def _key(turns) -> str:
        return repr([(role, list(parts)) for role, parts in turns])

    def _write(self, scene: Scene) -> list[int]:
        number = self.known[render(scene).tobytes()]
        return [number // 8**place % 8 for place in range(self.length)]

    def _read(self, codes: Sequence[int]) -> Scene:
        return self.scenes[sum(int(code) * 8**place for place, code in enumerate(codes))]

    def _parts(self, message: Message) -> list[Part]:
        return [self._write(part) if isinstance(part, Scene) else part for part in message.content]

    def codes(self, pictures: np.ndarray) -> np.ndarray:
        return np.array([self._write(self.scenes[self.known[p.tobytes()]]) for p in pictures])

    def pictures(self, codes: Sequence[Sequence[int]], first: int | None = None) -> list[Image.Image]:
        whole = [render(self._read(row)) for row in codes]
        return [Image.fromarray(p if first is None or first >= 8 else p // 2) for p in whole]

    def describe(self, codes: Sequence[Sequence[int]]) -> list[str]:
        return [f"{describe(self._read(row)).capitalize()}." for row in codes]

    def ask(self, codes: Sequence[Sequence[int]], questions: Sequence[str]) -> list[str]:
        return [self.truths[self._read(row), q].upper() + "." for row, q in zip(codes, questions, strict=True)]

    def draw(self, texts: Sequence[str]) -> list[list[int] | None]:
        by_words = {describe(scene): scene for scene in reversed(self.scenes)}
        return [self._write(by_words[text]) for text in texts]

    def edit(self, codes: Sequence[Sequence[int]], instructions: Sequence[str]) -> list[list[int] | None]:
        plain = {(scene, words.lower().rstrip(".")): target for (scene, words), target in self.after.items()}
        return [self._write(plain[self._read(row), words.lower().rstrip(".")])
                for row, words in zip(codes, instructions, strict=True)]

    def answer(self, dialogues, most: int) -> list[list[Part]]:
        return [self.replies.get(self._key(turns), ["I do not know."]) for turns in dialogues]

    def through_vae(self, pictures: np.ndarray) -> list[Image.Image]:
        return [Image.fromarray(picture) for picture in pictures]


def few_things(seed: int, index: int) -> Scene:
    """A small world: three things, two backgrounds, large or beside each other."""
    things = ("sun", "tree", "whale")
    one, other = things[index % 3], things[(index + 1 + index // 3 % 2) % 3]
    layout = ("large", "left of")[index // 6 % 2]
    return Scene(("noto", "fluent")[index // 12 % 2], ("white", "sea")[index // 24 % 2], layout,
                 (one, other) if layout == "left of" else (one,), jitter=index + 1000 * seed)
