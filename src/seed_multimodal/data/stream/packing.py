"""Packing of sequences into rows of fixed length; arrays of packed and padded rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.language.vocabulary import IGNORE_INDEX, ImageVocabulary

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


def make_row(
    sequences: Sequence[Arrays], length: int, pad_id: int, packed: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, labels and positions, int32 [length] each, of sequences of total length at most `length`.

    Packed: the first label of each sequence becomes -100, since it would be predicted from the previous sequence, and
    positions restart, also in the padding. Padded: positions continue, as in the original.
    """
    input_ids = np.full(length, pad_id, np.int32)
    labels = np.full(length, IGNORE_INDEX, np.int32)
    positions = np.arange(length, dtype=np.int32)
    start = 0
    for ids, own in sequences:
        end = start + len(ids)
        input_ids[start:end], labels[start:end] = ids, own
        if packed:
            labels[start] = IGNORE_INDEX
            positions[end:] -= len(ids)
        start = end
    return input_ids, labels, positions


def split_long(
    ids: np.ndarray, labels: np.ndarray, length: int, vocabulary: ImageVocabulary
) -> list[Arrays]:
    """A document of texts and images split into pieces of at most `length`, never inside an image.

    A piece ends where a text or an image ends; only a text that does not fit into a row by itself is cut. A piece that
    continues a text starts with the last token before the cut, so that each text token is a target once. Raises
    BadRecord: an image does not fit into a row.
    """
    starts = _segment_starts(ids, vocabulary)
    pieces: list[Arrays] = []
    start = 0
    while len(ids) - start > length:
        stop = _last_stop(ids, starts, start, length, vocabulary)
        if stop - start < 2:  # only a repeated token or `<s>` before an image that needs the row
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
    """Where the piece from `start` ends."""
    limit = start + length
    number = int(np.searchsorted(starts, limit, side="right")) - 1
    first = int(starts[number])  # of the text or image at the limit
    end = int(starts[number + 1]) if number + 1 < len(starts) else len(ids)
    is_image = (
        ids[first] == vocabulary.boi_id
        and first + 1 < end
        and vocabulary.is_code_id(int(ids[first + 1]))
    )
    if is_image and end - first > length:
        raise BadRecord(
            "image too long", f"an image has {end - first} tokens, but rows have {length}."
        )
    fits_by_itself = end - first < length and first > start
    return first if is_image or fits_by_itself else limit
