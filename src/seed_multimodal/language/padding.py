"""Rows of different lengths side by side, padded on the left as a decoder needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of ids → ids [B, L] and mask [B, L] (int64, 1 where a row's own ids are)."""
    longest = max(map(len, rows), default=0)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row):] = torch.as_tensor(row, dtype=torch.long)
        mask[number, longest - len(row):] = 1
    return ids, mask


def embeds_padded_left(rows: Sequence[Tensor], pad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, D] and the vector [D] of padding → [B, L, D] and mask [B, L] (int64)."""
    longest = max(map(len, rows))
    mask = pad.new_zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        mask[number, longest - len(row):] = 1
    return torch.stack([torch.cat([pad.expand(longest - len(row), -1), row]) for row in rows]), mask
