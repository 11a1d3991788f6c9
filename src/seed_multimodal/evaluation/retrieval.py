"""Image ↔ text retrieval with LAVIS's metrics, for any number of images.

`txt_r5`: share of images with one of their captions among the five best texts; `img_r5`: share of
captions with their image among the five best images; `agg_metrics`: mean of the three text levels.
Scores are computed in blocks of queries.

LAVIS's `k_test` (128 scores per query) cannot change a recall at 10. Unlike in LAVIS, a text that
captions several images is correct for each, and ties count as errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seed_multimodal.disk import JsonObject
from seed_multimodal.evaluation.clip import TextEncoder
from seed_multimodal.evaluation.metrics import bootstrap, finite

LEVELS = (1, 5, 10)
BLOCK = 1 << 26  # scores at a time: 256 MB
TEXT_BATCH = 256
Ints: TypeAlias = NDArray[np.int64]


# ---- ranks


@torch.no_grad()
def ranks(queries: Tensor, gallery: Tensor, pairs: Ints, counts: Ints | None = None) -> Ints:
    """Number of wrong items that score at least as high as the best right item of each query [Q].

    Args:
        queries, gallery: features [Q, E] and [G, E] on one device; scores are dot products.
        pairs: [P, 2] of query and right item, sorted by query; each query has one or more.
        counts: how often each item stands in the gallery [G]; None: once.

    Raises DataError: features that are not finite, which would rank first.
    """
    wrong_above = np.empty(len(queries), np.int64)
    copies = torch.ones(len(gallery)) if counts is None else torch.from_numpy(counts)
    copies = copies.to(gallery)  # [G]
    block_rows = max(1, BLOCK // len(gallery))
    for start in range(0, len(queries), block_rows):
        # 1. Scores of a block of queries, and which items are right.
        scores = queries[start : start + block_rows] @ gallery.T  # [b, G]
        finite(scores.sum().cpu(), "embeddings")
        block = slice(*np.searchsorted(pairs[:, 0], [start, start + len(scores)]))
        query, item = torch.from_numpy(pairs[block]).to(scores.device).unbind(1)
        is_right = torch.zeros_like(scores, dtype=torch.bool)
        is_right[query - start, item] = True

        # 2. All wrong items that score at least as high as the best right one.
        best = scores.masked_fill(~is_right, -torch.inf).amax(1, keepdim=True)  # [b, 1]
        is_above = (scores >= best) & ~is_right
        wrong_above[start : start + len(scores)] = (is_above.to(copies) @ copies).cpu()
    return wrong_above


def retrieval(images: Tensor, texts: TextEncoder, captions: Sequence[Sequence[str]]) -> JsonObject:
    """Both directions between unit features of images [N, E] and their captions.

    Returns:
        n, texts (captions), `txt_r1` … `img_r10` as `Estimate`s (captions of the same image are
        resampled together), and `lavis`: LAVIS's dictionary, in percent.
    """
    # 1. Image and text of each caption; distinct texts are embedded and scored once.
    index_of: dict[str, int] = {}
    pairs_of_captions: list[tuple[int, int]] = []
    for index, image_captions in enumerate(captions):
        for caption in image_captions:
            pairs_of_captions.append((index, index_of.setdefault(caption, len(index_of))))
    image, text = np.array(pairs_of_captions, np.int64).T

    # 2. Embeddings of the texts.
    distinct = list(index_of)
    embeddings = [
        texts(distinct[start : start + TEXT_BATCH]).to(images)
        for start in range(0, len(distinct), TEXT_BATCH)
    ]
    embedded = torch.cat(embeddings)

    # 3. Ranks: of each image's captions among the texts, of each caption's image among the images.
    pairs = np.unique(np.stack([image, text], 1), axis=0)
    to_text = ranks(images, embedded, pairs, np.bincount(text))
    to_image = ranks(embedded, images, np.unique(pairs[:, ::-1], axis=0))[text]
    recalls: JsonObject = {}
    for k in LEVELS:
        recalls[f"txt_r{k}"] = bootstrap(to_text < k)
        recalls[f"img_r{k}"] = bootstrap(to_image < k, image)
    percent = {name: 100.0 * recall.value for name, recall in recalls.items()}
    return {"n": len(images), "texts": len(text), **recalls, "lavis": _with_means(percent)}


def _with_means(recalls: dict[str, float]) -> dict[str, float]:
    """The dictionary that LAVIS's retrieval task reports, in percent."""
    # LAVIS selects checkpoints by `agg_metrics`.
    for direction in ("txt", "img"):
        levels = [recalls[f"{direction}_r{level}"] for level in LEVELS]
        recalls[f"{direction}_r_mean"] = float(np.mean(levels))
    recalls["r_mean"] = (recalls["txt_r_mean"] + recalls["img_r_mean"]) / 2
    recalls["agg_metrics"] = recalls["txt_r_mean"]
    return recalls
