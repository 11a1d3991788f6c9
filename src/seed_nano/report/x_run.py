"""One split of the report of a SEED-X: what `SplitRun` asks of every system; boxes, wide scenes, condition pictures.

The sections are reconstruction, conditioned (rebuilt beside the picture before an edit), drawing, caption, qa, edit,
detection, and wide (scenes of four times the area, read in several views and in one).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from seed_multimodal.evaluation.metrics import bootstrap, matched, same_answer
from seed_multimodal.images.boxes import draw_boxes
from seed_nano.report.samples import SEED
from seed_nano.report.split_run import SplitRun
from seed_nano.report.tasks import Section, all_words, likeness, picture_words, score
from seed_nano.world.scene import boxes
from seed_nano.world.wide import (
    QUARTERS,
    ask_wide,
    describe_wide,
    read_wide,
    render_wide,
    wide_at,
    wide_boxes,
)
from seed_nano.world.x_records import detect_phrase

WIDE_SPLITS = ("val", "pairs", "places", "styles")
LEAST = 0.05  # share of a picture that must be unchanged for its PSNR to be taken
Box = tuple[float, float, float, float]


class XRun(SplitRun):
    """See the module."""

    system: Any

    sheets = ("reconstructions", "conditioned", "drawings", "edits", "detections", "wide")
    plots, rebuilt_from = (), "the tower's features"

    def parts(self) -> dict[str, Callable[[], Section]]:
        """The sections that this split has material for."""
        asked = {"conditioned": self._conditioned, "drawing": self._drawing, "caption": self._caption,
                 "qa": self._questions, "edit": self._edits, "detection": self._detection}
        wide = {"wide": self._wide} if self.samples.split in WIDE_SPLITS else {}
        return {"reconstruction": self._reconstruction, **(asked if self.samples.edits else {}), **self.size_parts(),
                **wide}

    def _code_use(self) -> Section:
        return {}  # pictures are features

    def _conditioned(self) -> Section:
        """Targets of edits, rebuilt beside the pictures before: what is new comes from the features alone."""
        edits = self.samples.edits
        before, targets = self._before_and_after()
        made = self.pictures["conditioned"] = self.system.rebuild(targets, before)
        scenes = [edit.target for _, edit in edits]
        return {"n": len(made), **score(picture_words(self.judge, made), all_words(scenes)),
                **likeness(made, scenes), "unchanged_psnr": bootstrap(_unchanged(made, before, targets)),
                "ceiling": self._ceiling(scenes)}

    def _before_and_after(self) -> tuple[list[Image.Image], list[Image.Image]]:
        """The given pictures of the edits, and their targets."""
        edits = self.samples.edits
        before, targets = ([Image.fromarray(picture) for picture in self._render(scenes)] for scenes in
                           ([scene for scene, _ in edits], [edit.target for _, edit in edits]))
        return before, targets

    def _edits(self) -> Section:
        """As of every system; and PSNR against the given picture where the instruction changes nothing."""
        found = super()._edits()
        before, targets = self._before_and_after()
        return {**found, "unchanged_psnr": bootstrap(_unchanged(self.pictures["edited"], before, targets))}

    def _detection(self) -> Section:
        """Every box of a thing that is named."""
        scenes = self.samples.scenes[: self.sizes.scenes]
        names = [random.Random(f"{SEED} detect {row}").choice(scene.things) for row, scene in enumerate(scenes)]
        pictures = [Image.fromarray(picture) for picture in self.real[: len(scenes)]]
        return self._boxes("detection", pictures, names, list(map(boxes, scenes)), True)

    def _boxes(self, name: str, pictures: Sequence[Image.Image], names: Sequence[str],
               there: Sequence[Sequence[tuple[str, Box]]], views: bool) -> Section:
        wanted = [[box for one, box in row if one == thing] for thing, row in zip(names, there, strict=True)]
        phrases = [detect_phrase(thing, row) for thing, row in zip(names, there, strict=True)]
        found = self.system.detect(pictures, phrases, views)
        shares = [[tuple(value / picture.size[side % 2] for side, value in enumerate(box)) for box in row]
                  for picture, row in zip(pictures, found, strict=True)]
        hits = [matched(one, other) for one, other in zip(shares, wanted, strict=True)]
        self.answers[name] = [{"phrase": phrase, "found": row} for phrase, row in zip(phrases, found, strict=True)]
        if views:
            self.pictures[name] = [draw_boxes(picture, row, width=1) for picture, row in
                                   zip(pictures[:10], found, strict=False)]
            self.answers[f"{name}_asked"] = phrases[:10]
        return {"n": len(pictures), **rates(hits, list(map(len, shares)), list(map(len, wanted)))}

    def _wide(self) -> Section:
        """Descriptions (each thing at its place), questions and boxes; in several views, and `one_` view."""
        number = self.sizes.rungs
        scenes = [wide_at(SEED, row, self.samples.split) for row in range(number)]
        pictures = [Image.fromarray(render_wide(scene)) for scene in scenes]
        asked = [ask_wide(scene, random.Random(f"{SEED} {row}")) for row, scene in enumerate(scenes)]
        names = [random.Random(f"{SEED} wide {row}").choice(scene.there) for row, scene in enumerate(scenes)]
        self.pictures["wide"] = pictures[:5]
        found: Section = {"n": number}
        for prefix, views in (("", True), ("one_", False)):
            texts = self.system.say(pictures, [self.system.inner.tasks.describe] * number, views)
            said = self.system.say(pictures, [question for question, _ in asked], views)
            right = [[read_wide(text).get(quarter, "") == name
                      for quarter, name in zip(QUARTERS, scene.things, strict=True)]
                     for text, scene in zip(texts, scenes, strict=True)]
            boxed = self._boxes(f"{prefix}wide_detection", pictures, names, list(map(wide_boxes, scenes)), views)
            found |= {f"{prefix}all": bootstrap([all(row) for row in right]),
                      f"{prefix}quarters": bootstrap(np.array(right, float).mean(1)),
                      f"{prefix}questions": bootstrap([same_answer(one, answer)
                                                       for one, (_, answer) in zip(said, asked, strict=True)]),
                      f"{prefix}f1": boxed["f1"]}
            self.answers[f"{prefix}wide"] = [{"scene": describe_wide(scene), "text": text}
                                             for scene, text in zip(scenes, texts, strict=True)]
        return found


def _unchanged(made: Sequence[Image.Image | None], before: Sequence[Image.Image], targets: Sequence[Image.Image]
               ) -> list[float]:
    """PSNR in dB of each picture against the one before, over the pixels that are the same before and after; pictures
    with hardly any such pixels are left out, those that are not there are 0."""
    found = []
    for picture, source, target in zip(made, before, targets, strict=True):
        one, other = (np.asarray(image, np.float32) for image in (source, target))
        same = (np.abs(one - other).max(2) == 0)
        if same.mean() < LEAST:
            continue
        if picture is None:
            found.append(0.0)
            continue
        error = np.square(np.asarray(picture.convert("RGB"), np.float32) - one).mean(2)[same].mean()
        found.append(float(10 * np.log10(255**2 / max(float(error), 0.1))))
    return found


def rates(hits: Sequence[int], found: Sequence[int], wanted: Sequence[int]) -> Section:
    """Precision, recall and F1 over all boxes, with intervals over pictures."""
    right, made, there = (np.array(values, float) for values in (hits, found, wanted))
    draws = np.random.default_rng(0).integers(0, len(right), (1000, len(right)))

    def estimate(over: Any) -> Any:
        value = 0.0 if over.sum() == 0 else right.sum() / over.sum()
        low, high = np.percentile(right[draws].sum(1) / np.maximum(over[draws].sum(1), 1e-9), (2.5, 97.5))
        whole: Any = bootstrap([value])
        return type(whole)(value, float(low), float(high), len(right))

    return {"precision": estimate(made), "recall": estimate(there), "f1": estimate((made + there) / 2)}
