"""One split of the report of a LaVIT: what `SplitRun` asks of every system, and how its tokens follow what there is to
see.

The sections are tokens (how many a picture has by the number of things in it, and how near the rebuilt features are),
codes, reconstruction, drawing, wide_drawing (the same codes in 3:2, judged when squeezed back to the square), caption,
qa, and edit (composed of a picture and words).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from seed_multimodal.evaluation.batched import Codes
from seed_multimodal.evaluation.batched_lavit import WIDE
from seed_multimodal.evaluation.metrics import RESAMPLES, Estimate, bootstrap, codebook_statistics
from seed_nano.report.split_run import SplitRun
from seed_nano.report.tasks import Section, picture_words, score
from seed_nano.world.scene import empty_pictures
from seed_nano.world.things import BACKGROUNDS
from seed_nano.world.words import describe

SHOWN = 10  # pictures with their kept patches
COMPOSED = 4  # pairs of pictures
EMPTY_DRAWS = 8  # selections of each empty scene, where the selector draws
GREY, DIM = 128, 0.25  # a dropped patch is shown with so much of its contrast


class LavitRun(SplitRun):
    """See the module."""

    system: Any

    sheets = ("kept", "reconstructions", "drawings", "wide_drawings", "edits", "composed")
    plots = ("tokens.png",)
    rebuilt_from = "its codes"

    def parts(self) -> dict[str, Callable[[], Section]]:
        """The sections that this split has material for."""
        asked = {"drawing": self._drawing, "wide_drawing": self._wide_drawing, "caption": self._caption,
                 "qa": self._questions, "edit": self._edits, "composed": self._composed}
        return {"tokens": self._tokens, "reconstruction": self._reconstruction,
                **(asked if self.samples.edits else {}), **self.size_parts()}

    def _code_use(self) -> Section:
        return {"codes": code_use(self.system.tokens(self.codes.tolist()), self.system.codebook_size)}

    # ---- tokens

    def _tokens(self) -> Section:
        """By the number of things, with its spread; empty scenes are all backgrounds. The loss is that of stage 1."""
        counts = np.array(list(map(len, self.system.tokens(self.codes.tolist()))))
        things = np.array([sum(scene.counts) for scene in self.samples.scenes])
        empty = empty_pictures(self.system.image_size)
        repeats = EMPTY_DRAWS if self.system.draws else 1
        bare = self.system.codes(np.concatenate([empty] * repeats)).tolist()
        without = np.array(list(map(len, self.system.tokens(bare)))).reshape(repeats, len(empty))
        self._show("kept", self.real[:SHOWN], self.codes[:SHOWN].tolist())
        self._show("kept_empty", empty, bare[: len(empty)])
        near, blind = self.system.losses(self.codes.tolist())
        found = {str(number): amount(counts[things == number]) for number in sorted(set(things.tolist()))}
        return {"n": len(counts), "patches": self.system.most, "cosine": bootstrap(near), "blind": bootstrap(blind),
                "mean": bootstrap(counts), "fullest": int(things.max()),
                "things": {"0": amount(without.ravel(), list(BACKGROUNDS) * repeats), **found},
                "empty_share": ratio(without.mean(0), counts[things == things.max()])}

    def _show(self, kind: str, pictures: NDArray[np.uint8], codes: Sequence[Codes]) -> None:
        masks = self.system.patches(codes)
        self.pictures[kind] = [dimmed(picture, mask) for picture, mask in zip(pictures, masks, strict=True)]
        self.answers[kind] = [int(mask.sum()) for mask in masks]

    # ---- pictures

    def _wide_drawing(self) -> Section:
        """The pictures that were drawn from words, from the same codes in 3:2."""
        scenes = self.samples.scenes[: self.sizes.scenes]
        made = self.pictures["wide_drawn"] = self._paint(self.drawn, ratio=WIDE)
        size = next((picture.size for picture in made if picture is not None), (self.system.image_size,) * 2)
        found = picture_words(self.judge, list(map(self._squeezed, made)))
        self.answers["wide_drawn"] = [{"asked": describe(scene), "read": read}
                                      for scene, read in zip(scenes, found, strict=True)]
        real = [self._squeezed(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
                for picture in self.real[: len(scenes)]]
        words = self.words[: len(scenes)]
        return {"n": len(scenes), **score(found, words), "without_picture": made.count(None), "size": size,
                "ceiling": score(picture_words(self.judge, real), words)["all"]}

    def _squeezed(self, picture: Image.Image | None) -> Image.Image | None:
        side = self.system.image_size
        return None if picture is None else picture.resize((side, side), Image.Resampling.BICUBIC)

    def _composed(self) -> Section:
        """Two pictures at a time, without words, to be looked at: what is right is not defined."""
        pairs = [(row, row + 1) for row in range(0, min(2 * COMPOSED, len(self.real) - 1), 2)]
        one, other = ([self.codes[pair[side]].tolist() for pair in pairs] for side in (0, 1))
        codes = self.system.join(one, other)
        self.pictures["composed"] = [picture for pair, made in zip(pairs, self._paint(codes), strict=True)
                                     for picture in (*(Image.fromarray(self.real[row]) for row in pair), made)]
        return {"n": len(pairs), "without_picture": codes.count(None)}


def amount(counts: NDArray[np.integer], groups: Sequence[str] | None = None) -> Section:
    """Mean and standard deviation of numbers of tokens; `groups`: what the interval resamples."""
    return {"mean": bootstrap(counts, groups), "spread": round(float(np.std(counts)), 3)}


def ratio(some: NDArray[Any], others: NDArray[Any]) -> Estimate:
    """Mean of `some` over mean of `others`; the interval resamples both."""
    shake = np.random.default_rng(0)
    above, below = (values[shake.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
                    for values in (some, others))
    low, high = np.percentile(above / below, (2.5, 97.5))
    return Estimate(float(some.mean() / others.mean()), float(low), float(high), len(some))


def code_use(codes: Sequence[Sequence[int]], codebook: int) -> Section:
    """`codebook_statistics` of rows of any lengths: those that do not need a position."""
    found = codebook_statistics(np.concatenate([np.asarray(row, np.int64) for row in codes])[:, None], codebook)
    return {"sequences": len(codes), "distinct": len(set(map(tuple, codes))),
            **{name: found[name] for name in ("codebook", "used", "usage", "perplexity")}}


def dimmed(picture: NDArray[np.uint8], kept: NDArray[np.bool_]) -> Image.Image:
    """A picture [H, W, 3] with all but its `kept` patches [g, g] greyed."""
    mask = np.repeat(np.repeat(kept, len(picture) // len(kept), 0), picture.shape[1] // kept.shape[1], 1)[..., None]
    grey = GREY + DIM * (picture.astype(np.float32) - GREY)
    return Image.fromarray(np.where(mask, picture, grey).astype(np.uint8))
