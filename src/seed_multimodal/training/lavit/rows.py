"""Rows with images of variable length: replaces the placeholders of packing by the selected patches.

Data workers plan a number of placeholders per image (`data.decoders.lavit`); the number of selected patches and their
codes are known only on the device. Here rows grow or shrink by the difference; sequences and order stay. Packed rows
keep their length if the selected patches fit (padded), so that attention is compiled for few lengths; otherwise they
grow by eighths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.stream.llm_batches import LlmBatch
from seed_multimodal.language.vocabulary import IGNORE_INDEX

_EIGHTH = 8


@dataclass
class ReadyBatch(LlmBatch):
    """A micro-batch with the actual image lengths.

    Attributes:
        features: [n, N, D] of input images, on the device; keep: [n, N], selection mask 0 or 1; None without images.
        kept: int64 [T], indices of the selected patches. places: int64 [T], their positions in the flattened batch.
    """

    features: Tensor | None = None
    keep: Tensor | None = None
    kept: Tensor | None = None
    places: Tensor | None = None


class _Row(NamedTuple):
    """A row without padding; `places` of features; `squares`: sum of squared sequence lengths."""

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    places: np.ndarray
    squares: int


class _Image(NamedTuple):
    """`words` placeholders from `start` on, replaced by `tokens` tokens: `codes`, or input features."""

    start: int
    words: int
    tokens: int
    codes: Sequence[int] | None


def fill_rows(
    batch: LlmBatch,
    counts: Sequence[int],
    codes: Sequence[Sequence[int] | None],
    code_start: int,
    pad_id: int,
) -> tuple[LlmBatch, Tensor]:
    """The batch with its images' actual tokens, and the positions of input features (int64 [T]).

    Args:
        counts: selected patches of each image. codes: of a target image; None for an input image, whose ids are
            placeholders (`code_start`).
    """
    views, packed = batch.views, batch.attention_mask is None
    words = [] if views is None else views.tokens_per_view
    marks = np.zeros(batch.input_ids.shape, np.int8) if views is None else views.marks.cpu().numpy()
    images = iter(zip(words, counts, codes, strict=True))
    rows = []
    for line in range(len(marks)):
        at, found = np.flatnonzero(marks[line]), list[_Image]()
        while len(at):
            found.append(_Image(int(at[0]), *next(images)))
            at = at[found[-1].words :]
        rows.append(_filled(batch, line, found, code_start))
    planned, length = batch.input_ids.shape[1], max(len(row.ids) for row in rows)
    if packed:
        step = -(-planned // _EIGHTH)
        length = max(planned, -(-length // step) * step)
    ids, labels, positions = (
        torch.from_numpy(np.stack(column)).long()
        for column in zip(*(_padded(row, length, pad_id, packed) for row in rows), strict=True)
    )
    places = [torch.from_numpy(row.places) + number * length for number, row in enumerate(rows)]
    tokens = torch.tensor([len(row.ids) for row in rows])
    return replace(
        batch,
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        tokens=int(tokens.sum()),
        attention_mask=None if packed else (torch.arange(length)[None] < tokens[:, None]).long(),
        learned=int((labels[:, 1:] != IGNORE_INDEX).sum()),
        squares=sum(row.squares for row in rows),
        views=None,
    ), torch.cat(places)


def _filled(batch: LlmBatch, line: int, images: Sequence[_Image], code_start: int) -> _Row:
    """One row with its images."""
    ids, labels, positions = (
        one[line].numpy() for one in (batch.input_ids, batch.labels, batch.position_ids)
    )
    used = len(ids) if batch.attention_mask is None else int(batch.attention_mask[line].sum())
    if batch.attention_mask is None:  # padding is a last sequence without loss
        last = int(np.flatnonzero(positions == 0)[-1])
        used = used if (labels[last:] != IGNORE_INDEX).any() else last
    repeat = (np.arange(len(ids)) < used).astype(np.int64)
    for image in images:
        repeat[image.start : image.start + image.words] = 0
        repeat[image.start] = image.tokens
    source, ends = np.repeat(np.arange(len(ids)), repeat), np.cumsum(repeat)
    number = np.cumsum(positions == 0)[source]
    ids, labels, places = ids[source], labels[source], [np.zeros(0, np.int64)]
    firsts = np.flatnonzero(np.diff(number, prepend=-1))
    sizes = np.diff(firsts, append=len(source))
    for image in images:
        here = np.arange(ends[image.start] - image.tokens, ends[image.start])
        if image.codes is None:
            places.append(here)
            continue
        ids[here] = code_start + np.asarray(image.codes, np.int64)
        labels[here] = np.where(labels[here] == IGNORE_INDEX, IGNORE_INDEX, ids[here])
    return _Row(
        ids,
        labels,
        np.arange(len(source)) - np.repeat(firsts, sizes),
        np.concatenate(places),
        int((sizes * sizes).sum()),
    )


def _padded(
    row: _Row, length: int, pad_id: int, packed: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, labels and positions of a row of this length; padding is a separate sequence if `packed`."""
    rest = length - len(row.ids)
    after = np.arange(rest) + (0 if packed else len(row.ids))
    return (
        np.pad(row.ids, (0, rest), constant_values=pad_id),
        np.pad(row.labels, (0, rest), constant_values=IGNORE_INDEX),
        np.concatenate([row.positions, after]),
    )
