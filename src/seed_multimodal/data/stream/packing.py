"""Sequences in rows of fixed length: which ones share a row, and the arrays of packed and of padded rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from seed_multimodal.data.decoders.base import IGNORED

Arrays = tuple[np.ndarray, np.ndarray]  # ids and labels of one sequence, int32 [n] each


def best_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """Indices (rising) of the sequences that fill `capacity` best, the first (oldest) always among them; of equally
    good choices the one with the oldest sequences. Each length is from 1 to `capacity`.

    A subset sum, with a bit for each reachable length: with a few dozen short sequences almost every row is full.
    """
    full, mask = 1 << capacity, (1 << capacity + 1) - 1
    reachable = [1 << lengths[0]]  # after n sequences: bit k is set when some of them make up k tokens
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
    """Ids, labels and positions, int32 [length] each, of sequences that are together at most `length` long.

    Packed, the first label of each becomes -100, since models predict a token from the place before it, and positions
    begin anew, in the padding, too; else they go on, as in the original's padded rows of one sequence.
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
    """A document's tokens as pieces of at most `length`; each later one begins with the last token of the one before,
    so each token is a target exactly once."""
    if len(ids) <= length:
        return [(ids, labels)]
    return [(ids[start:start + length], labels[start:start + length]) for start in range(0, len(ids) - 1, length - 1)]
