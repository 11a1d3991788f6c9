"""Image ↔ text retrieval by the rules of the released evaluation, with intervals, chance and any gallery size.

The metric names and `K_TEST` are LAVIS's: each query keeps its 128 best scores, all others count as -100; `txt_r5` is
the share of pictures with one of their captions among the five best texts, `img_r5` of captions with their picture
among the five best; `agg_metrics` is the mean over the three text levels.
A caption that two pictures share letter for letter is right for both (LAVIS counts one of them as wrong), and
ties count against the query, so equal features score nothing instead of winning by order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seed_multimodal.errors import DataError
from seed_multimodal.evaluation.metrics import FloatArray, bootstrap, chance_at_k, retrieval_ranks

K_TEST = 128
NOT_KEPT = -100.0
LEVELS = (1, 5, 10)
BLOCK = 256
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Captions:
    """All captions of N pictures in one row: `texts` [T], the picture `owner` [T] and the wording `wording` [T]."""

    texts: list[str]
    owner: NDArray[np.int64]
    wording: NDArray[np.int64]
    pictures: int

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]]) -> Captions:
        """From the captions of each picture.

        Raises:
            DataError: a picture without caption.
        """
        empty = next((i for i, texts in enumerate(captions) if not texts), None)
        if empty is not None:
            raise DataError(f"retrieval: picture {empty} has no caption.")
        texts = [text for row in captions for text in row]
        numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        return cls(texts, np.array([i for i, row in enumerate(captions) for _ in row], np.int64),
                   np.array([numbers[text] for text in texts], np.int64), len(captions))

    def right_texts(self, pictures: slice) -> Mask:
        """[B, T]: the captions of these pictures, also where another picture has the same text."""
        rows = range(self.pictures)[pictures]
        return np.stack([np.isin(self.wording, self.wording[self.owner == row]) for row in rows])

    def right_pictures(self, texts: slice) -> Mask:
        """[B, N]: the pictures that have these captions."""
        owners = defaultdict(list)
        for wording, owner in zip(self.wording.tolist(), self.owner.tolist(), strict=True):
            owners[wording].append(owner)
        right = np.zeros((len(self.wording[texts]), self.pictures), dtype=bool)
        for row, wording in enumerate(self.wording[texts].tolist()):
            right[row, owners[wording]] = True
        return right


def score_matrix(queries: FloatArray, gallery: FloatArray, k_test: int = K_TEST) -> FloatArray:
    """Dot products [Q, G] of features [Q, E] and [G, E]; all but the `k_test` best of a row are -100."""
    scores = queries @ gallery.T
    if k_test >= scores.shape[1]:
        return scores
    best = np.argpartition(-scores, k_test - 1, axis=1)[:, :k_test]
    kept = np.full_like(scores, NOT_KEPT)
    np.put_along_axis(kept, best, np.take_along_axis(scores, best, axis=1), axis=1)
    return kept


def retrieval(pictures: FloatArray, texts: FloatArray, captions: Captions, k_test: int = K_TEST) -> dict[str, Any]:
    """Both directions between unit features [N, E] of pictures and [T, E] of their captions.

    Returns:
        n, texts, k_test, `txt_r1` … `img_r10` as `Estimate`s (shares; captions of one picture are resampled together),
        their chance values, and `lavis`: the original's dictionary, in percent.
    """
    if pictures.shape[0] != captions.pictures or texts.shape[0] != len(captions.texts):
        raise DataError(f"retrieval: {captions.pictures} pictures with {len(captions.texts)} captions, but features of "
                        f"{pictures.shape[0]} and {texts.shape[0]}.")
    to_text, chance_text = _ranks(pictures, texts, captions.right_texts, k_test)
    to_picture, chance_picture = _ranks(texts, pictures, captions.right_pictures, k_test)
    section: dict[str, Any] = {"n": captions.pictures, "texts": len(captions.texts), "k_test": k_test}
    for level in LEVELS:
        section[f"txt_r{level}"] = bootstrap((to_text < level).astype(float))
    for level in LEVELS:
        section[f"img_r{level}"] = bootstrap((to_picture < level).astype(float), captions.owner.tolist())
    section["r_mean"] = float(np.mean([section[f"{way}_r{level}"].value for way in ("txt", "img") for level in LEVELS]))
    section["chance"] = {**{f"txt_r{k}": v for k, v in chance_text.items()},
                         **{f"img_r{k}": v for k, v in chance_picture.items()}}
    section["lavis"] = lavis_metrics(to_text, to_picture)
    return section


def lavis_metrics(to_text: NDArray[np.int64], to_picture: NDArray[np.int64]) -> dict[str, float]:
    """The dictionary that LAVIS's retrieval task reports, in percent, from ranks (0 is best) of both directions."""
    result: dict[str, float] = {}
    for way, ranks in (("txt", to_text), ("img", to_picture)):
        for level in LEVELS:
            result[f"{way}_r{level}"] = 100.0 * float((ranks < level).mean())
        result[f"{way}_r_mean"] = float(np.mean([result[f"{way}_r{level}"] for level in LEVELS]))
    result["r_mean"] = (result["txt_r_mean"] + result["img_r_mean"]) / 2
    result["agg_metrics"] = result["txt_r_mean"]
    return result


def _ranks(queries: FloatArray, gallery: FloatArray, right: Callable[[slice], Mask],
           k_test: int) -> tuple[NDArray[np.int64], dict[int, float]]:
    """Rank of the best right item of each query, in blocks, and what random order would score at each level."""
    found, sizes = [], []
    for start in range(0, len(queries), BLOCK):
        block = slice(start, min(start + BLOCK, len(queries)))
        mask = right(block)
        found.append(retrieval_ranks(score_matrix(queries[block], gallery, k_test), mask))
        sizes.append(mask.sum(1))
    counts, share = np.unique(np.concatenate(sizes), return_counts=True)
    chance = dict.fromkeys(LEVELS, 0.0)
    for count, many in zip(counts.tolist(), share.tolist(), strict=True):
        row = np.arange(len(gallery))[None] < count
        for level in LEVELS:
            chance[level] += chance_at_k(row, level) * many / len(queries)
    return np.concatenate(found), {level: round(value, 5) for level, value in chance.items()}
