"""Rows of LaVIT's pre-training: placeholders of images become as many positions as the image has
tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from seed_multimodal.data.stream.llm_batches import LlmBatch
from seed_multimodal.data.stream.views import INPUT_IMAGE, TARGET_IMAGE, BatchViews
from seed_multimodal.language.vocabulary import IGNORE_INDEX as NO
from seed_multimodal.models.lavit.train_rows import fill_rows

START = 90
END = 91
CODE = 92
PAD = 0


IDS = [START, CODE, CODE, END, 5, 6, 7, START, CODE, CODE, END, PAD]
LABELS = [NO, NO, NO, NO, 5, 6, NO, NO, CODE, CODE, END, NO]
POSITIONS = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0]
MARKS = [0, INPUT_IMAGE, INPUT_IMAGE, 0, 0, 0, 0, 0, TARGET_IMAGE, TARGET_IMAGE, 0, 0]


def fill(
    counts: list[int], codes: list[list[int] | None], rows: Any = (), packed: bool = True
) -> tuple[LlmBatch, list[int]]:
    """One row with images of these numbers of tokens, and the indices of understood tokens."""
    columns = rows or (IDS, LABELS, POSITIONS, MARKS)
    ids, labels, positions, marks = (torch.tensor([column]) for column in columns)
    n_images = len(counts)
    views = BatchViews(
        torch.zeros(n_images, 3, 2, 2),
        torch.zeros(n_images, 2),
        torch.zeros(n_images, dtype=torch.bool),
        marks,
        [0] * n_images,
        [2] * n_images,
    )
    mask = None if packed else (ids != PAD).long()
    batch = LlmBatch(
        ids, labels, positions, mask, tokens=0, learned=0, sequences=2, squares=0, views=views
    )
    filled, indices = fill_rows(batch, counts, codes, CODE, PAD)
    assert filled.input_ids.shape == filled.labels.shape == filled.position_ids.shape
    return filled, indices.tolist()


def test_fill_rows_with_a_shorter_and_a_longer_image():
    """One position instead of two, three instead of two: the row keeps its length."""
    filled, indices = fill([1, 3], [None, [4, 0, 2]])
    assert filled.input_ids.tolist() == [[START, CODE, END, 5, 6, 7, START, 96, 92, 94, END, PAD]]
    assert filled.labels.tolist() == [[NO, NO, NO, 5, 6, NO, NO, 96, 92, 94, END, NO]]
    assert filled.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0]]
    assert indices == [1]
    assert (filled.tokens, filled.learned, filled.squares) == (11, 6, 25 + 36)


def test_fill_rows_lengthens_rows_by_eighths():
    filled, indices = fill([7, 1], [None, [3]])
    assert filled.input_ids.shape == (1, 16)
    assert indices == list(range(1, 8))
    assert filled.tokens == 15
    assert filled.position_ids[0, 11:].tolist() == [0, 1, 2, 3, 0]


def test_fill_rows_of_a_padded_batch():
    """One sequence per row: positions continue into the padding, which the mask excludes."""
    rows = (
        [START, CODE, CODE, END, 5, PAD, PAD],
        [NO, NO, NO, NO, 5, NO, NO],
        list(range(7)),
        [0, INPUT_IMAGE, INPUT_IMAGE, 0, 0, 0, 0],
    )
    filled, indices = fill([1], [None], rows, packed=False)
    assert filled.input_ids.tolist() == [[START, CODE, END, 5]]
    assert indices == [1]
    assert filled.attention_mask.tolist() == [[1, 1, 1, 1]]
