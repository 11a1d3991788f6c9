"""Rows with images of variable length: placeholders of packing become the selected patches.

Data workers plan a number of placeholders per image (`recipes.lavit.data`); the number of selected
patches and their codes are computed on the device. Here rows grow or shrink by the difference;
sequences and order stay. Packed rows keep their length if the selected patches fit (padded), so
that attention is compiled for few lengths; otherwise they grow by eighths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    n_rows, planned = batch.input_ids.shape
    is_packed = batch.attention_mask is None

    # 1. How often each planned token occurs `[R · L]`: padding never, and the first placeholder of
    #    an image as often as the image has tokens.
    repeats = _is_used(batch).long().flatten()
    starts = []  # of the images' placeholders, which are consecutive and in the images' order
    if batch.views is not None:
        indices = batch.views.marks.flatten().cpu().nonzero().flatten()
        position = 0
        for n_placeholders, count in zip(batch.views.tokens_per_view, counts, strict=True):
            start = int(indices[position])
            repeats[start : start + n_placeholders] = 0
            repeats[start] = count
            starts.append(start)
            position += n_placeholders
    source = torch.arange(len(repeats)).repeat_interleave(repeats)  # planned token of each token
    ends = repeats.cumsum(0)

    # 2. Codes of target images, which are learned where the placeholders are.
    ids = batch.input_ids.flatten()[source]
    labels = batch.labels.flatten()[source]
    features = torch.zeros(len(source), dtype=torch.bool)  # tokens that features replace
    for start, image_codes in zip(starts, codes, strict=True):
        image = slice(int(ends[start] - repeats[start]), int(ends[start]))
        if image_codes is None:
            features[image] = True
            continue
        ids[image] = code_start + torch.tensor(image_codes, dtype=torch.int64)
        labels[image] = torch.where(labels[image] == IGNORE_INDEX, IGNORE_INDEX, ids[image])

    # 3. Positions begin at 0 in each sequence.
    sequences = (batch.position_ids.flatten() == 0).cumsum(0)[source]
    _, lengths = sequences.unique_consecutive(return_counts=True)
    first_tokens = lengths.cumsum(0) - lengths
    positions = torch.arange(len(source)) - first_tokens.repeat_interleave(lengths)

    # 4. Where each token is in rows of a common length.
    rows = source // planned
    n_tokens = torch.bincount(rows, minlength=n_rows)
    length = int(n_tokens.max())
    if is_packed:
        step = math.ceil(planned / _EIGHTH)
        length = max(planned, math.ceil(length / step) * step)
    row_starts = n_tokens.cumsum(0) - n_tokens
    target = rows * length + torch.arange(len(source)) - row_starts[rows]

    # 5. The batch. Positions of padded rows go on in their padding; that of packed rows is a new
    #    sequence.
    columns = torch.arange(length).expand(n_rows, -1)
    padding_positions = columns - n_tokens[:, None] if is_packed else columns

    def in_rows(values: Tensor, padding: Tensor) -> Tensor:
        return padding.flatten().scatter(0, target, values).view(n_rows, length)

    filled = replace(
        batch,
        input_ids=in_rows(ids, torch.full_like(columns, pad_id)),
        labels=in_rows(labels, torch.full_like(columns, IGNORE_INDEX)),
        position_ids=in_rows(positions, padding_positions),
        attention_mask=None if is_packed else (columns < n_tokens[:, None]).long(),
        tokens=len(source),
        squares=int((lengths * lengths).sum()),
        views=None,
    )
    return filled, target[features]


def _is_used(batch: LlmBatch) -> Tensor:
    """Bool `[R, L]`: no padding, which in packed rows is a last sequence without loss."""
    if batch.attention_mask is not None:
        return batch.attention_mask.bool()
    is_used = torch.ones_like(batch.input_ids, dtype=torch.bool)
    for row, (labels, positions) in enumerate(zip(batch.labels, batch.position_ids, strict=True)):
        last_start = int((positions == 0).nonzero()[-1])
        if not (labels[last_start:] != IGNORE_INDEX).any():
            is_used[row, last_start:] = False
    return is_used
