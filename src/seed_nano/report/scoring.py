"""Scores: label accuracy of images and captions, similarity of images, means with intervals.

Images are classified by the judge, captions parsed by nano's grammar, both into (first thing,
second thing, style, background, layout with counts). An incomplete image, a caption outside the
grammar and a missing label count as wrong.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torchvision.ops import box_iou

from seed_multimodal.disk import JsonObject
from seed_multimodal.evaluation.metrics import RESAMPLES, Estimate, FloatArray, bootstrap, psnr
from seed_multimodal.evaluation.vqa import vqa_answer
from seed_nano.report.judge import Judge
from seed_nano.world.scene import Scene, render, thing_mask
from seed_nano.world.targets import JUDGE_CLASSES, label_names
from seed_nano.world.words import parse_caption

Section: TypeAlias = JsonObject
OptionalImages = Sequence[Image.Image | None]
BoolArray: TypeAlias = NDArray[np.bool_]
LabelNames = tuple[str | None, ...]
"""A value for each of `JUDGE_CLASSES`; None: missing."""
NO_LABELS: LabelNames = (None,) * len(JUDGE_CLASSES)
UNCHANGED = 0.05  # minimum share of unchanged pixels for their PSNR
OVERLAP = 0.5  # minimum intersection over union of a detected box


def true_labels(scenes: Sequence[Scene]) -> list[LabelNames]:
    """The true labels of scenes."""
    return [tuple(label_names(scene).values()) for scene in scenes]


def caption_labels(text: str) -> LabelNames:
    """The labels in a caption."""
    labels = parse_caption(text)
    return tuple(label_names(labels).values()) if labels else NO_LABELS


def image_labels(judge: Judge, images: OptionalImages) -> list[LabelNames]:
    """The judge's labels of images."""
    classes = list(judge.config.labels.values())
    rows = iter(judge.labels([image for image in images if image is not None]).tolist())
    labels: list[LabelNames] = []
    for image in images:
        if image is None:
            labels.append(NO_LABELS)
        else:
            labels.append(tuple(names[i] for names, i in zip(classes, next(rows), strict=True)))
    return labels


def label_matches(predicted: Sequence[LabelNames], wanted: Sequence[LabelNames]) -> BoolArray:
    """[N, 5] label correctness."""
    shape = (-1, len(JUDGE_CLASSES))
    return np.array(predicted, object).reshape(shape) == np.array(wanted, object).reshape(shape)


def score(predicted: Sequence[LabelNames], wanted: Sequence[LabelNames]) -> Section:
    """Accuracy over all labels (`all`) and for each label."""
    right = label_matches(predicted, wanted)
    return {
        "all": bootstrap(np.all(right, axis=1)),
        **dict(zip(JUDGE_CLASSES, map(bootstrap, right.T), strict=True)),
    }


def means_by_kind(
    hits: ArrayLike, kinds: Sequence[str], groups: Sequence[Hashable]
) -> dict[str, Estimate]:
    """Means by kind; intervals resample `groups`."""
    means = {}
    for kind in sorted(set(kinds)):
        rows = [row for row, row_kind in enumerate(kinds) if row_kind == kind]
        means[kind] = bootstrap(np.asarray(hits)[rows], [groups[row] for row in rows])
    return means


def retrieval(
    judge: Judge, images: Sequence[Image.Image], real: Sequence[Image.Image]
) -> FloatArray:
    """[N] 1.0 if the nearest real image to a reconstruction, by the judge's features, is its
    original; `real` starts with the originals, in order. Ties count as wrong."""
    similarity = judge.read(images)[1] @ judge.read(real)[1].T
    return ((similarity >= similarity.diagonal()[:, None]).sum(1) == 1).double().numpy()


def similarity(images: Sequence[Image.Image], scenes: Sequence[Scene]) -> Section:
    """Means of `similarities`."""
    return {name: bootstrap(column) for name, column in similarities(images, scenes).items()}


def similarities(images: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, FloatArray]:
    """PSNR in dB of all pixels and of those of things (weighted by `thing_mask`), and SSIM, `[N]`.

    SSIM has windows of 7×7 pixels; only whole windows count.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    columns: dict[str, list[float]] = {"psnr": [], "psnr_things": [], "ssim": []}
    for image, scene in zip(images, scenes, strict=True):
        pixels = np.array(image.convert("RGB"), np.float64)
        reference = render(scene, image.width).astype(np.float64)
        error = np.square(pixels - reference).mean(2)
        mask = thing_mask(scene, image.width)
        # SSIM at each pixel; margins, where a window is cut off, do not count.
        drawn = torch.from_numpy(pixels).movedim(2, 0)[None]
        wanted = torch.from_numpy(reference).movedim(2, 0)[None]
        _, ssim_map = ssim(
            drawn,
            wanted,
            gaussian_kernel=False,
            kernel_size=7,
            data_range=255.0,
            return_full_image=True,
        )
        columns["psnr"].append(psnr(error.mean()))
        columns["psnr_things"].append(psnr((error * mask).sum() / max(mask.sum(), 1e-6)))
        columns["ssim"].append(float(ssim_map[..., 3:-3, 3:-3].mean()))
    return {name: np.array(column) for name, column in columns.items()}


def unchanged_psnr(
    images: OptionalImages, before: Sequence[Image.Image], targets: Sequence[Image.Image]
) -> Estimate:
    """PSNR against the image before the edit, over pixels equal in it and the target; 0 for a
    missing image. Images with few such pixels are skipped."""
    values = []
    for image, source, target in zip(images, before, targets, strict=True):
        before_pixels = np.array(source, np.float64)
        target_pixels = np.array(target, np.float64)
        # Pixels that the edit does not change.
        same = (before_pixels == target_pixels).all(2)
        if same.mean() < UNCHANGED:
            continue
        if image is None:
            values.append(0.0)
        else:
            pixels = np.array(image.convert("RGB").resize(source.size), np.float64)
            error = np.square(pixels - before_pixels).mean(2)
            values.append(psnr(error[same].mean()))
    return bootstrap(values)


def ratio(above: ArrayLike, below: ArrayLike, paired: bool = False) -> Estimate:
    """Sum of `above` over sum of `below` if `paired`, else mean over mean; the interval resamples
    both."""
    rng = np.random.default_rng(0)
    above = np.asarray(above, float)
    below = np.asarray(below, float)
    total = np.sum if paired else np.mean
    # 1. Rows of each resample; paired values are resampled together.
    rows_above = rng.integers(0, len(above), (RESAMPLES, len(above)))
    rows_below = rows_above
    if not paired:
        rows_below = rng.integers(0, len(below), (RESAMPLES, len(below)))
    # 2. The ratio of each resample gives the interval.
    upper = total(above[rows_above], axis=1)
    lower = total(below[rows_below], axis=1)
    low, high = np.percentile(upper / np.maximum(lower, 1e-9), (2.5, 97.5))
    # 3. The ratio of the values themselves.
    value = float(total(above) / total(below)) if total(below) else 0.0
    return Estimate(value, float(low), float(high), len(above))


def box_rates(hits: Sequence[int], n_found: Sequence[int], n_wanted: Sequence[int]) -> Section:
    """Precision, recall and F1 over all boxes, with intervals over images."""
    both = (np.array(n_found) + np.array(n_wanted)) / 2
    return {
        "precision": ratio(hits, n_found, paired=True),
        "recall": ratio(hits, n_wanted, paired=True),
        "f1": ratio(hits, both, paired=True),
    }


def same_answer(answer: str, truth: str) -> bool:
    """Whether two short answers are equal under VQA normalization: case, articles and punctuation
    are ignored."""
    return vqa_answer(answer) == vqa_answer(truth)


def count_matches(predicted: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> int:
    """Number of detected target boxes, greedily matched by overlap."""
    if not len(predicted):
        return 0
    overlaps = box_iou(
        torch.tensor(wanted, dtype=torch.float64).reshape(-1, 4),
        torch.tensor(predicted, dtype=torch.float64).reshape(-1, 4),
    )
    hits = 0
    for row in overlaps:
        best = int(row.argmax())
        if row[best] >= OVERLAP:
            overlaps[:, best] = 0
            hits += 1
    return hits
