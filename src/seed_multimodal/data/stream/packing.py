"""Packing of sequences into rows of fixed length; arrays and views of packed and padded rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.data.decoders.features import BatchViews, SequenceViews, View
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.language.vocabulary import IGNORE_INDEX, ImageVocabulary

Arrays = tuple[np.ndarray, np.ndarray]  # ids and labels of a sequence, int32 [n]


@dataclass
class Piece:
    """A sequence that fits into a row, and its images' views."""

    source: int
    position: int  # of its record in the source's order
    index: int  # among the pieces of its record
    ids: np.ndarray  # int32 [n]
    labels: np.ndarray  # int32 [n]
    views: SequenceViews | None = None
    position_ids: np.ndarray | None = None  # [A, n], where positions have axes

    def __len__(self) -> int:
        return len(self.ids)


def best_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """Indices of the sequences that fill `capacity` best, increasing, always with the first
    (oldest).

    Subset sum with a bit per reachable length; a few dozen short sequences fill almost every row.
    Ties prefer older sequences.

    lengths: each from 1 to `capacity`.
    """
    # 1. Reachable lengths: bit k of `reachable[n]` is set if a subset of the first n + 1 sequences,
    #    with the first, has k tokens. The search ends as soon as the capacity is reached.
    full = 1 << capacity
    mask = (1 << (capacity + 1)) - 1
    reachable = [1 << lengths[0]]
    for length in lengths[1:]:
        if reachable[-1] & full:
            break
        reachable.append((reachable[-1] | (reachable[-1] << length)) & mask)

    # 2. Trace the largest length back: a sequence is used where the length could not be reached
    #    without it.
    remaining = reachable[-1].bit_length() - 1
    chosen = []
    for index in range(len(reachable) - 1, 0, -1):
        if not reachable[index - 1] >> remaining & 1:
            chosen.append(index)
            remaining -= lengths[index]
    return [0, *reversed(chosen)]


def make_row(
    sequences: Sequence[Arrays], length: int, pad_id: int, packed: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, labels and positions, int32 [length] each, of sequences of total length at most
    `length`.

    Packed: the first label of each sequence becomes -100, since it would be predicted from the
        previous sequence, and positions restart, also in the padding. Padded: positions continue,
        as in the original.
    """
    row_ids = np.full(length, pad_id, np.int32)
    row_labels = np.full(length, IGNORE_INDEX, np.int32)
    positions = np.arange(length, dtype=np.int32)
    start = 0
    for ids, labels in sequences:
        end = start + len(ids)
        row_ids[start:end] = ids
        row_labels[start:end] = labels
        if packed:
            row_labels[start] = IGNORE_INDEX
            positions[end:] -= len(ids)  # the next sequence, or the padding, starts at 0
        start = end
    return row_ids, row_labels, positions


def join_position_ids(rows: Sequence[Sequence[Piece]], length: int) -> Tensor | None:
    """Positions `[A, B, L]` on the axes, of rows of `length` tokens; None: they have none.

    The padding, and sequences without their own, count from 0 on all axes.
    """
    planned = [piece.position_ids for row in rows for piece in row]
    n_axes = max((len(plan) for plan in planned if plan is not None), default=0)
    if not n_axes:
        return None
    joined = np.zeros((n_axes, len(rows), length), np.int64)
    for index, row in enumerate(rows):
        start = 0
        for piece in row:
            end = start + len(piece)
            plan = np.arange(len(piece)) if piece.position_ids is None else piece.position_ids
            joined[:, index, start:end] = plan
            start = end
        joined[:, index, start:] = np.arange(length - start)
    return torch.from_numpy(joined)


def join_views(rows: Sequence[Sequence[Piece]], length: int) -> BatchViews | None:
    """The views of a batch of rows of `length` tokens, or None.

    rows: the sequences of each row, left to right.
    """
    pixels: list[Tensor] = []
    views: list[View] = []
    marks = np.zeros((len(rows), length), np.int8)
    for row_marks, row in zip(marks, rows, strict=True):
        start = 0  # of the sequence in its row
        for piece in row:
            end = start + len(piece)
            if piece.views is not None:
                pixels.append(piece.views.pixels)
                views += piece.views.views
                row_marks[start:end] = piece.views.marks
            start = end
    if not pixels:
        return None
    positions, is_target, seeds, tokens_per_view = map(list, zip(*views, strict=True))
    return BatchViews(
        torch.cat(pixels),
        torch.tensor(positions),
        torch.tensor(is_target),
        torch.from_numpy(marks),
        seeds,
        tokens_per_view,
    )


def split_long(
    ids: np.ndarray, labels: np.ndarray, length: int, vocabulary: ImageVocabulary
) -> list[Arrays]:
    """A document of texts and images split into pieces of at most `length`, never inside an image.

    A piece ends where a text or an image ends; only a text that does not fit into a row by itself
    is cut. A piece that continues a text starts with the last token before the cut, so that each
    text token is a target once. Raises
    BadRecord: an image does not fit into a row.
    """
    if len(ids) <= length:
        return [(ids, labels)]
    starts = _segment_starts(ids, vocabulary)
    pieces: list[Arrays] = []
    start = 0
    while len(ids) - start > length:
        stop = _last_stop(ids, starts, start, length, vocabulary)
        # Drop a single token: one repeated from the last piece, or `<s>` before an image that needs
        # the row.
        if stop - start < 2:
            start = stop
            continue
        pieces.append((ids[start:stop], labels[start:stop]))
        after_image = ids[stop - 1] == vocabulary.eoi_id
        start = stop if after_image else stop - 1
    return [*pieces, (ids[start:], labels[start:])]


def _segment_starts(ids: np.ndarray, vocabulary: ImageVocabulary) -> np.ndarray:
    """The positions where a text or an image starts."""
    image_starts = np.flatnonzero(ids == vocabulary.boi_id)
    image_ends = np.flatnonzero(ids == vocabulary.eoi_id) + 1
    borders = np.union1d(image_starts, image_ends)
    return np.union1d([0], borders[borders < len(ids)])


def _last_stop(
    ids: np.ndarray, starts: np.ndarray, start: int, length: int, vocabulary: ImageVocabulary
) -> int:
    """Where the piece from `start` ends; `starts` as of `_segment_starts`."""
    # 1. The text or image that crosses the limit of the piece.
    limit = start + length
    index = int(np.searchsorted(starts, limit, side="right")) - 1
    first = int(starts[index])
    end = int(starts[index + 1]) if index + 1 < len(starts) else len(ids)

    # 2. An image is never cut: it moves to the next piece.
    is_image = (
        ids[first] == vocabulary.boi_id
        and first + 1 < end
        and vocabulary.is_code_id(int(ids[first + 1]))
    )
    if is_image and end - first > length:
        raise BadRecord(
            "image too long", f"an image has {end - first} tokens, but rows have {length}."
        )

    # 3. So does a text that fits into a row; a longer one is cut at the limit.
    fits_in_a_row = end - first < length and first > start
    return first if is_image or fits_in_a_row else limit
