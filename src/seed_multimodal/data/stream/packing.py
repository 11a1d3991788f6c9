"""Packing of sequences into rows of fixed length; arrays of packed and padded rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from seed_multimodal.data.decoders.base import IGNORED

Arrays = tuple[np.ndarray, np.ndarray]  # ids and labels of a sequence, int32 [n]


def best_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """Increasing indices of the sequences that fill `capacity` best, always with the first (oldest); ties prefer older
    sequences. Each length is from 1 to `capacity`.

    Subset sum with a bit per reachable length; a few dozen short sequences fill almost every row.
    """
    full, mask = 1 << capacity, (1 << capacity + 1) - 1
    reachable = [1 << lengths[0]]  # after n sequences: bit k is set if a subset has k tokens
    for length in lengths[1:]:
        if reachable[-1] & full:
            break
        reachable.append((reachable[-1] | reachable[-1] << length) & mask)
    left = reachable[-1].bit_length() - 1
    chosen = []
    for index in range(len(reachable) - 1, 0, -1):
        if not reachable[index - 1] >> left & 1:
            chosen.append(index)
            left -= lengths[index]
    return [0, *reversed(chosen)]


def make_row(sequences: Sequence[Arrays], length: int, pad_id: int, packed: bool = True
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, labels and positions, int32 [length] each, of sequences of total length at most `length`.

    Packed: the first label of each sequence becomes -100, since it would be predicted from the previous sequence, and
    positions restart, also in the padding. Padded: positions continue, as in the original.
    """
    input_ids = np.full(length, pad_id, np.int32)
    labels = np.full(length, IGNORED, np.int32)
    positions = np.arange(length, dtype=np.int32)
    start = 0
    for ids, own in sequences:
        end = start + len(ids)
        input_ids[start:end], labels[start:end] = ids, own
        if packed:
            labels[start] = IGNORED
            positions[end:] -= len(ids)
        start = end
    return input_ids, labels, positions


def split_long(ids: np.ndarray, labels: np.ndarray, length: int) -> list[Arrays]:
    """A document split into pieces of at most `length` with one token of overlap, so each token is a target once."""
    if len(ids) <= length:
        return [(ids, labels)]
    return [(ids[start:start + length], labels[start:start + length]) for start in range(0, len(ids) - 1, length - 1)]
