"""What a right answer is: pictures and captions as the words of a scene's five labels, and how near a copy is.

A picture is read by the judge, a caption by nano's grammar; both become (first thing, second thing, style, background,
layout with counts), and every label is compared apart. An answer without a (whole) picture, a caption outside the
grammar, and a label that a caption leaves out are wrong, never left out of the count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from seed_multimodal.evaluation.batched import Codes, Dialogue, Part
from seed_multimodal.evaluation.metrics import FloatArray, bootstrap, retrieval_at_k
from seed_nano.report.judge import Judge
from seed_nano.world.scene import Scene, render, thing_mask
from seed_nano.world.targets import JUDGED, NOTHING, label_ids
from seed_nano.world.words import Labels, read_caption

Section = dict[str, Any]
Pictures = Sequence[Image.Image | None]
BoolArray = NDArray[np.bool_]

LABELS = tuple(JUDGED)
Words = tuple[str | None, ...]
"""A word for each of `LABELS`; None: not there, or not said."""
UNREAD: Words = (None,) * len(LABELS)


class System(Protocol):
    """Interface of a system for the report, in batches; `section`: codes in a section of its codebook."""

    codebook_size: int
    section: int
    image_size: int

    def codes(self, pictures: NDArray[np.uint8]) -> NDArray[np.int64]:
        """uint8 [N, H, W, 3] → codes [N, T]."""
        ...

    def pictures(self, codes: Sequence[Codes], first: int | None = None) -> list[Image.Image]:
        """Codes of N pictures → N pictures, drawn from their `first` codes only if that is given."""
        ...

    def describe(self, codes: Sequence[Codes]) -> list[str]:
        """A description of each picture."""
        ...

    def ask(self, codes: Sequence[Codes], questions: Sequence[str]) -> list[str]:
        """A short answer to each question about its picture."""
        ...

    def draw(self, texts: Sequence[str]) -> list[Codes | None]:
        """Codes of a drawing of each text; None where the answer holds no whole picture."""
        ...

    def edit(self, codes: Sequence[Codes], instructions: Sequence[str]) -> list[Codes | None]:
        """Codes of each picture after its instruction; None where the answer holds no whole picture."""
        ...

    def answer(self, dialogues: Sequence[Dialogue], most: int) -> list[list[Part]]:
        """What the system says in at most `most` tokens, nothing forced: texts and codes of whole pictures."""
        ...


def scene_words(scene: Scene) -> Words:
    """The true words of a scene."""
    return tuple(JUDGED[name][number] for name, number in label_ids(scene, JUDGED).items())


def all_words(scenes: Sequence[Scene]) -> list[Words]:
    """The true words of scenes."""
    return [scene_words(scene) for scene in scenes]


def caption_words(text: str) -> Words:
    """What a caption says."""
    said = read_caption(text) or Labels()
    if not said.things:
        return UNREAD
    layout = said.layout
    if layout in ("many", "two kinds"):
        layout = " ".join([layout, *map(str, said.counts)])
    return said.things[0], said.things[1] if len(said.things) == 2 else NOTHING, said.style, said.background, layout


def picture_words(judge: Judge, pictures: Pictures) -> list[Words]:
    """What the judge reads off pictures."""
    there = [picture for picture in pictures if picture is not None]
    classes = list(judge.config.labels.values())
    read = iter(judge.labels(there).tolist())
    return [UNREAD if picture is None else tuple(row[i] for row, i in zip(classes, next(read), strict=True))
            for picture in pictures]


def right_labels(found: Sequence[Words], wanted: Sequence[Words]) -> BoolArray:
    """[N, 5] which labels are right."""
    return np.array([[a == b for a, b in zip(one, other, strict=True)]
                     for one, other in zip(found, wanted, strict=True)], dtype=bool).reshape(-1, len(LABELS))


def every(right: BoolArray) -> BoolArray:
    """[N] where all labels `[N, 5]` are right."""
    return np.asarray(right.all(1))


def score(found: Sequence[Words], wanted: Sequence[Words], groups: Sequence[Hashable] | None = None) -> Section:
    """Shares of answers with every label right (`all`), and with each label right."""
    right = right_labels(found, wanted)
    return {"all": bootstrap(every(right), groups),
            **{name: bootstrap(right[:, column], groups) for column, name in enumerate(LABELS)}}


def confusions(found: Sequence[Words], wanted: Sequence[Words], most: int = 10) -> dict[str, int]:
    """The most frequent wrong names of things: `dog read as fox` -> how often."""
    pairs = Counter(f"{other} read as {one}" for row, truth in zip(found, wanted, strict=True)
                    for one, other in zip(row[:2], truth[:2], strict=True) if one != other and row is not UNREAD)
    return dict(pairs.most_common(most))


def retrieval(judge: Judge, pictures: Sequence[Image.Image], real: NDArray[np.uint8]) -> FloatArray:
    """1.0 where the real picture nearest to a copy (cosine of the judge's features) is its own, [Q]; `real` begins with
    the originals, in order."""
    similarity = (judge.embed_images(pictures) @ judge.embed_images(real).T).numpy()
    return retrieval_at_k(similarity, np.eye(len(pictures), len(real), dtype=bool), 1)


def likeness(pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> Section:
    """PSNR in dB over all pixels and over those of things (weighted by `thing_mask`), and SSIM, of copies of scenes."""
    rows = []
    for picture, scene in zip(pictures, scenes, strict=True):
        made = np.asarray(picture.convert("RGB"), np.float32)
        real, mask = render(scene, picture.width).astype(np.float32), thing_mask(scene, picture.width)
        error = np.square(made - real).mean(2)
        rows.append((_psnr(error.mean()), _psnr((error * mask).sum() / max(mask.sum(), 1e-6)), ssim(made, real)))
    columns = np.array(rows).reshape(-1, 3).T
    return {name: bootstrap(column) for name, column in zip(("psnr", "psnr_things", "ssim"), columns, strict=True)}


def _psnr(error: float) -> float:
    return 10 * math.log10(255**2 / max(float(error), 0.1))  # at most 58 dB: equal pictures have no number


def ssim(one: FloatArray, other: FloatArray, window: int = 7) -> float:
    """Structural similarity of two pictures [H, W, 3] in 0..255: the mean over 7x7 windows and channels."""
    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(values, window, 1)

    a, b = (torch.from_numpy(np.asarray(x, np.float64)).permute(2, 0, 1)[None] for x in (one, other))
    mean_a, mean_b = mean(a), mean(b)
    spread_a, spread_b, both = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    light, contrast = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = ((2 * mean_a * mean_b + light) * (2 * both + contrast)
             / ((mean_a**2 + mean_b**2 + light) * (spread_a + spread_b + contrast)))
    return float(found.mean())
