"""One split of the report: everything that is asked of a system about it, scored; pictures and answers are kept.

The sections are those of the report: codes, reconstruction, ladder, prefix (the first codes only), drawing, caption,
qa, edit, conversation, examples, story. `ceiling` in a section is the judge's own score on the real pictures.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from seed_multimodal.evaluation.batched import Codes
from seed_multimodal.evaluation.metrics import bootstrap, codebook_statistics, majority_baseline, same_answer
from seed_nano.report.judge import Judge
from seed_nano.report.longer_run import LongerRun
from seed_nano.report.samples import SEED, Samples
from seed_nano.report.sizes import REPORTED, measure
from seed_nano.report.tasks import (
    Pictures,
    Section,
    System,
    Words,
    all_words,
    caption_words,
    confusions,
    every,
    likeness,
    picture_words,
    retrieval,
    right_labels,
    score,
)
from seed_nano.world.dialogues import sentence
from seed_nano.world.questions import KINDS, ask
from seed_nano.world.splits import scene_at
from seed_nano.world.words import describe, normalise

PREFIXES = (4, 8, 16)
BLIND = 3000
"""Training questions from which the most frequent answers are counted."""


class SplitRun(LongerRun):
    """Measures one split.

    Attributes:
        sections: what was measured; pictures: kind -> pictures in the order of the samples, for the sheets.
        sheets, plots: those that its report has; rebuilt_from: in words.
        drawn: the codes of the pictures drawn from words.
    """

    sheets: tuple[str, ...] = ("reconstructions", "drawings", "edits", "conversations", "stories", "examples", "ladder",
                               "progressive", "codes")
    plots: tuple[str, ...] = ("ladder.png", "codes_curve.png")
    rebuilt_from = "32 codes"

    def __init__(self, system: System, judge: Judge, samples: Samples) -> None:
        super().__init__(system, judge, samples)
        self.sizes, self.words = samples.sizes, all_words(samples.scenes)
        self.sections: Section = {}
        self.pictures: dict[str, Pictures] = {}
        self.drawn: list[Codes | None] = []

    def parts(self) -> dict[str, Callable[[], Section]]:
        """The sections that this split has material for, in the order in which they are measured."""
        asked = {"drawing": self._drawing, "caption": self._caption, "qa": self._questions, "edit": self._edits}
        return {"reconstruction": self._reconstruction, "ladder": self._ladder, "prefix": self._prefixes,
                **(asked if self.samples.edits else {}), **self.size_parts(), **self.longer_parts()}

    def size_parts(self) -> dict[str, Callable[[], Section]]:
        """Pictures of several sizes, of one split."""
        return {"sizes": self._sizes} if self.samples.split == "val" else {}

    def measure(self, done: Callable[[str], None] = lambda name: None) -> Section:
        """All sections; `done` is told of each."""
        self.real = self._render(self.samples.scenes)
        self.codes = self.system.codes(self.real)
        self.sections |= self._code_use()
        for name, part in self.parts().items():
            self.sections[name] = part()
            done(name)
        return self.sections

    def _code_use(self) -> Section:
        return {"codes": codebook_statistics(self.codes, self.system.codebook_size)}

    # ---- pictures

    def _reconstruction(self) -> Section:
        number = self.sizes.gallery
        made = self.pictures["rebuilt"] = self.system.pictures(self.codes[:number].tolist())
        found = self._read(made, "rebuilt")
        return {"n": number, **score(found, self.words[:number]),
                "r1": bootstrap(retrieval(self.judge, made, self.real)),
                **likeness(made, self.samples.scenes[:number]), "gallery": len(self.real),
                "ceiling": self._ceiling(self.samples.scenes[:number]),
                "confused": confusions(found, self.words[:number])}

    def _ladder(self) -> Section:
        """Round trip of the VAE; the true embedding drawn; where the system can show them."""
        number, found = self.sizes.rungs, {}
        for name in ("vae", "embedding"):
            rung = getattr(self.system, f"through_{name}", None)
            made = rung(self.real[:number]) if rung else None
            if made is not None:
                self.pictures[name] = made
                found[name] = score(picture_words(self.judge, made), self.words[:number])
                found[name] |= likeness(made, self.samples.scenes[:number])
        return {"n": number, **found, "ceiling": self._ceiling(self.samples.scenes[:number])}

    def _prefixes(self) -> Section:
        number, whole = self.sizes.rungs, self.codes.shape[1]
        found: Section = {"n": number}
        for first in (*PREFIXES, whole):
            made = (self.pictures["rebuilt"] if first == whole else
                    self.system.pictures(self.codes[:number].tolist(), first=first))
            self.pictures[f"first {first}"] = made
            found[str(first)] = score(picture_words(self.judge, made[:number]), self.words[:number])
        return found

    def _drawing(self) -> Section:
        scenes = self.samples.scenes[: self.sizes.scenes]
        codes = self.drawn = self.system.draw([describe(scene) for scene in scenes])
        made = self.pictures["drawn"] = self._paint(codes)
        found = self._read(made, "drawn")
        return {"n": len(scenes), **score(found, self.words[: len(scenes)]), "without_picture": codes.count(None),
                "ceiling": self._ceiling(scenes), "confused": confusions(found, self.words[: len(scenes)])}

    def _edits(self) -> Section:
        edits = self.samples.edits
        sources, targets = [scene for scene, _ in edits], [edit.target for _, edit in edits]
        given = self.system.codes(self._render(sources)).tolist()
        codes = self.system.edit(given, [sentence(edit.instruction) for _, edit in edits])
        made = self.pictures["edited"] = self._paint(codes)
        found, before, after = picture_words(self.judge, made), *map(all_words, (sources, targets))
        right, stays = right_labels(found, after), right_labels(before, after)
        self.answers["edits"] = [{"before": describe(scene), "instruction": edit.instruction,
                                  "target": describe(edit.target), "read": read}
                                 for (scene, edit), read in zip(edits, found, strict=True)]
        kinds = np.array([edit.kind for _, edit in edits])
        return {"n": len(edits), **score(found, after), "stayed": bootstrap(every(right | ~stays)),
                "unchanged": bootstrap(every(right_labels(found, before))), "without_picture": codes.count(None),
                "ceiling": self._ceiling(targets),
                "kinds": {kind: bootstrap(every(right)[kinds == kind]) for kind in sorted(set(kinds.tolist()))}}

    # ---- words

    def _caption(self) -> Section:
        scenes = self.samples.scenes[: self.sizes.scenes]
        texts = self.system.describe(self.codes[: len(scenes)].tolist())
        self.answers["captions"] = [{"scene": describe(scene), "text": text}
                                    for scene, text in zip(scenes, texts, strict=True)]
        exact = [normalise(text) == describe(scene) for scene, text in zip(scenes, texts, strict=True)]
        return {"n": len(scenes), **score(list(map(caption_words, texts)), self.words[: len(scenes)]),
                "exact": bootstrap(exact)}

    def _questions(self) -> Section:
        """Normalised exact match, beside the most frequent training answer to the kind; intervals resample scenes."""
        rows, asked = [row for row, _ in self.samples.questions], [question for _, question in self.samples.questions]
        answers = self.system.ask(self.codes[rows].tolist(), [question.question for question in asked])
        self.answers["questions"] = [
            {"scene": describe(self.samples.scenes[row]), "question": q.question, "answer": text, "truth": q.answer}
            for row, q, text in zip(rows, asked, answers, strict=True)]
        hits = np.array([same_answer(text, q.answer) for text, q in zip(answers, asked, strict=True)])
        blind = majority_baseline(_training_answers(), [(q.kind, q.answer) for q in asked])
        kinds = np.array([q.kind for q in asked])
        chosen = {kind: np.flatnonzero(kinds == kind) for kind in sorted(set(kinds.tolist()))}
        return {"n": len(asked), "all": bootstrap(hits, rows), "blind": bootstrap(blind, rows),
                "kinds": {kind: bootstrap(hits[at], [rows[i] for i in at]) for kind, at in chosen.items()},
                "blind_kinds": {kind: bootstrap(blind[at], [rows[i] for i in at]) for kind, at in chosen.items()}}

    def _sizes(self) -> Section:
        scenes = self.samples.scenes[: self.sizes.rungs]
        return {str(size): {name: bootstrap(hits) for name, hits in measure(self.system, scenes, size).items()}
                for size in REPORTED}

    # ---- inside

    def _read(self, pictures: Pictures, name: str) -> list[Words]:
        found = picture_words(self.judge, pictures)
        self.answers[name] = [{"asked": describe(scene), "read": read}
                              for scene, read in zip(self.samples.scenes, found, strict=False)]
        return found

    def _paint(self, codes: Sequence[Codes | None], **settings: Any) -> list[Image.Image | None]:
        """Pictures of the rows that have codes, None for the others; `settings` of the system's `pictures`."""
        pictures = iter(self.system.pictures([row for row in codes if row is not None], **settings))
        return [None if row is None else next(pictures) for row in codes]


def _training_answers() -> list[tuple[str, str]]:
    found = []
    for index in range(BLIND):
        question = ask(scene_at(SEED, index), KINDS[index % len(KINDS)], random.Random(index))
        if question is not None:
            found.append((question.kind, question.answer))
    return found
