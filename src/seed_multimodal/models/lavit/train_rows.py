"""Rows with images of variable length: placeholders of packing become the selected patches.

Data workers plan a number of placeholders per image (`models.lavit.data`); the number of selected
patches and their codes are computed on the device. Here rows grow or shrink by the difference;
sequences and order stay. Packed rows keep their length if the selected patches fit (padded), so
that attention is compiled for few lengths; otherwise they grow by eighths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    """A micro-batch with the actual image lengths. Its input images, None without any:

    Attributes:
        features: `[n, N, D]`, on the device.
        keep: `[n, N]`, selection mask 0 or 1.
        patch_indices: int64 `[T]`, the selected patches, in `[n · N]`.
        token_indices: int64 `[T]`, where these are in the flattened batch.
    """

    features: Tensor | None = None
    keep: Tensor | None = None
    patch_indices: Tensor | None = None
    token_indices: Tensor | None = None


class _Row(NamedTuple):
    """A row without padding."""

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    feature_indices: np.ndarray  # tokens that features replace
    squares: int  # sum of squared sequence lengths


class _Image(NamedTuple):
    """Placeholders of a row, and what replaces them."""

    start: int  # index of the first placeholder
    n_placeholders: int
    n_tokens: int
    codes: Sequence[int] | None  # of a target image; None: input features


def fill_rows(
    batch: LlmBatch,
    counts: Sequence[int],
    codes: Sequence[Sequence[int] | None],
    code_start: int,
    pad_id: int,
) -> tuple[LlmBatch, Tensor]:
    """The batch with its images' actual tokens, and where input features are in it (int64 `[T]`).

    Args:
        counts: selected patches of each image.
        codes: of a target image; None for an input image, whose ids are placeholders
            (`code_start`).
    """
    # 1. Rows without padding, with the actual images.
    is_packed = batch.attention_mask is None
    rows = []
    for index, images in enumerate(_images_of_rows(batch, counts, codes)):
        rows.append(_fill_row(batch, index, images, code_start))

    # 2. Their common length.
    planned = batch.input_ids.shape[1]
    length = max(len(row.ids) for row in rows)
    if is_packed:
        step = math.ceil(planned / _EIGHTH)
        length = max(planned, math.ceil(length / step) * step)

    # 3. The batch, padded to it.
    padded = [_pad(row, length, pad_id, is_packed) for row in rows]
    ids, labels, positions = (
        torch.from_numpy(np.stack(column)).long() for column in zip(*padded, strict=True)
    )
    n_tokens = torch.tensor([len(row.ids) for row in rows])
    attention_mask = None
    if not is_packed:
        attention_mask = (torch.arange(length)[None] < n_tokens[:, None]).long()
    filled = replace(
        batch,
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        tokens=int(n_tokens.sum()),
        attention_mask=attention_mask,
        learned=int((labels[:, 1:] != IGNORE_INDEX).sum()),
        squares=sum(row.squares for row in rows),
        views=None,
    )
    token_indices = []
    for index, row in enumerate(rows):
        token_indices.append(torch.from_numpy(row.feature_indices) + index * length)
    return filled, torch.cat(token_indices)


def _images_of_rows(
    batch: LlmBatch, counts: Sequence[int], codes: Sequence[Sequence[int] | None]
) -> Iterator[list[_Image]]:
    """The images of each row, by the marks of their placeholders."""
    if batch.views is None:
        yield from ([] for _ in batch.input_ids)
        return
    # Images are in the order of their placeholders, which are consecutive.
    views = batch.views
    images = iter(zip(views.tokens_per_view, counts, codes, strict=True))
    for marks in views.marks.cpu().numpy():
        row_images = []
        indices = np.flatnonzero(marks)
        while len(indices):
            n_placeholders, n_tokens, image_codes = next(images)
            start = int(indices[0])
            row_images.append(_Image(start, n_placeholders, n_tokens, image_codes))
            indices = indices[n_placeholders:]
        yield row_images


def _fill_row(batch: LlmBatch, index: int, images: Sequence[_Image], code_start: int) -> _Row:
    """One row with its images."""
    ids = batch.input_ids[index].numpy()
    labels = batch.labels[index].numpy()
    positions = batch.position_ids[index].numpy()

    # 1. The row without its padding, which in packed rows is a last sequence without loss.
    if batch.attention_mask is not None:
        length = int(batch.attention_mask[index].sum())
    else:
        length = len(ids)
        last_start = int(np.flatnonzero(positions == 0)[-1])
        if not (labels[last_start:] != IGNORE_INDEX).any():
            length = last_start

    # 2. How often each planned token occurs: the first placeholder of an image stands for all its
    #    tokens. `source`: the planned token of each token.
    repeats = (np.arange(len(ids)) < length).astype(np.int64)
    for image in images:
        repeats[image.start : image.start + image.n_placeholders] = 0
        repeats[image.start] = image.n_tokens
    source = np.repeat(np.arange(len(ids)), repeats)
    ends = np.cumsum(repeats)

    # 3. Positions begin at 0 in each sequence.
    sequence = np.cumsum(positions == 0)[source]
    starts = np.flatnonzero(np.diff(sequence, prepend=-1))
    lengths = np.diff(starts, append=len(source))
    new_positions = np.arange(len(source)) - np.repeat(starts, lengths)

    # 4. Codes of target images, which are learned where the placeholders are.
    ids = ids[source]
    labels = labels[source]
    feature_indices = [np.zeros(0, np.int64)]
    for image in images:
        end = ends[image.start]
        indices = np.arange(end - image.n_tokens, end)
        if image.codes is None:
            feature_indices.append(indices)
            continue
        ids[indices] = code_start + np.asarray(image.codes, np.int64)
        is_ignored = labels[indices] == IGNORE_INDEX
        labels[indices] = np.where(is_ignored, IGNORE_INDEX, ids[indices])
    squares = int((lengths * lengths).sum())
    return _Row(ids, labels, new_positions, np.concatenate(feature_indices), squares)


def _pad(
    row: _Row, length: int, pad_id: int, is_packed: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, labels and positions of a row of this length; packed rows' padding is a new sequence."""
    # Positions of padded rows go on; a new sequence begins at 0.
    n_padding = length - len(row.ids)
    first_position = 0 if is_packed else len(row.ids)
    return (
        np.pad(row.ids, (0, n_padding), constant_values=pad_id),
        np.pad(row.labels, (0, n_padding), constant_values=IGNORE_INDEX),
        np.concatenate([row.positions, np.arange(n_padding) + first_position]),
    )
