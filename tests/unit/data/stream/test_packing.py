"""Packing: the sequences of a row, its arrays, and cutting of long sequences."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.stream.packing import best_fit, make_row, split_long
from seed_multimodal.language.vocabulary import ImageVocabulary

VOCABULARY = ImageVocabulary(n_text=100, n_codes=50, tokens_per_image=4)


def test_best_fit():
    rng = random.Random(0)
    for _ in range(300):
        capacity = rng.randint(5, 40)
        lengths = [rng.randint(1, capacity) for _ in range(rng.randint(1, 9))]
        chosen = best_fit(lengths, capacity)
        assert chosen[0] == 0 and chosen == sorted(set(chosen))
        others = range(1, len(lengths))
        best = max(
            total
            for size in range(len(lengths))
            for some in itertools.combinations(others, size)
            if (total := lengths[0] + sum(lengths[index] for index in some)) <= capacity
        )
        assert sum(lengths[index] for index in chosen) == best


def test_best_fit_of_ties():
    assert best_fit([5, 3, 3, 3, 3], 11) == [0, 1, 2]
    assert best_fit([10, 1, 1], 10) == [0]
    assert best_fit([4, 9, 6, 6], 10) == [0, 2]


def test_make_row():
    first = np.array([1, 50, 51, 2], np.int32), np.array([1, 50, 51, 2], np.int32)
    second = np.array([1, 60, 2], np.int32), np.array([-100, -100, 2], np.int32)
    row = make_row([first, second], 10, pad_id=0)
    assert [array.tolist() for array in row] == [
        [1, 50, 51, 2, 1, 60, 2, 0, 0, 0],
        [-100, 50, 51, 2, -100, -100, 2, -100, -100, -100],
        [0, 1, 2, 3, 0, 1, 2, 0, 1, 2],
    ]
    assert first[1].tolist() == [1, 50, 51, 2]  # the input is unchanged
    assert {array.dtype for array in row} == {np.dtype(np.int32)}
    assert [array.tolist() for array in make_row([], 4, pad_id=9)] == [
        [9] * 4,
        [-100] * 4,
        [0, 1, 2, 3],
    ]


@pytest.mark.parametrize(
    ("total", "length"), [(10, 10), (11, 10), (19, 10), (20, 10), (57, 10), (3, 2)]
)
def test_split_long(total, length):
    ids = np.arange(total, dtype=np.int32)
    pieces = split_long(ids, ids, length, VOCABULARY)
    assert pieces[0][0][0] == 0 and all(2 <= len(piece) <= length for piece, _ in pieces)
    targets = [label for _, labels in pieces for label in labels[1:].tolist()]
    assert targets == list(range(1, total))
    assert all(before[-1] == after[0] for (before, _), (after, _) in itertools.pairwise(pieces))


def document(*segments: int) -> np.ndarray:
    """`<s>`, texts of these lengths (0: an image of four codes), `</s>`."""
    rng = np.random.default_rng(sum(segments))
    parts = [
        rng.integers(10, 100, size)
        if size
        else [VOCABULARY.boi_id, 101, 102, 103, 104, VOCABULARY.eoi_id]
        for size in segments
    ]
    return np.concatenate([[1], *parts, [2]]).astype(np.int32)


@pytest.mark.parametrize(
    ("segments", "lengths"),
    [
        ((3, 0, 4, 0), [14, 8]),  # the second image begins another piece, after the last text token
        ((3, 0, 0, 5), [16, 6]),  # a piece after an image starts with the text
        ((0, 30, 0), [16, 16, 14]),  # a text longer than a row is cut, right after its image
        ((20, 0, 8), [16, 12, 9]),  # … and before one
        ((15, 0, 2), [16, 10]),
        ((0, 0, 0, 0, 0), [13, 12, 7]),
        ((40,), [16, 16, 12]),
    ],
)
def test_split_long_of_documents(segments, lengths):
    ids = document(*segments)
    pieces = [piece for piece, _ in split_long(ids, ids, 16, VOCABULARY)]
    assert [len(piece) for piece in pieces] == lengths
    joined = pieces[0]
    for before, piece in itertools.pairwise(pieces):
        overlap = int(before[-1] != VOCABULARY.eoi_id)
        assert not overlap or before[-1] == piece[0]
        joined = np.concatenate([joined, piece[overlap:]])
    assert joined.tolist() == ids.tolist()
    for piece in pieces:  # whole images only
        starts, ends = (
            np.flatnonzero(piece == word) for word in (VOCABULARY.boi_id, VOCABULARY.eoi_id)
        )
        assert (ends - starts == 5).all() and len(starts) == len(ends)


def test_split_long_of_random_documents():
    rng = random.Random(0)
    for _ in range(400):
        ids = document(*(rng.choice((0, 0, rng.randint(1, 50))) for _ in range(rng.randint(1, 12))))
        length = rng.randint(8, 40)
        targets: list[int] = []
        for piece, labels in split_long(ids, ids, length, VOCABULARY):
            assert 0 < len(piece) <= length
            targets += labels[1:].tolist()
            assert (piece == VOCABULARY.boi_id).sum() == (piece == VOCABULARY.eoi_id).sum()
        lost = len(ids) - 1 - len(targets)  # the first token after an image where a piece ends
        assert 0 <= lost <= (ids == VOCABULARY.eoi_id).sum()


def test_split_long_of_an_image_longer_than_a_row():
    ids = document(3, 0, 3)
    with pytest.raises(BadRecord, match="an image has 6 tokens, but rows have 5"):
        split_long(ids, ids, 5, VOCABULARY)


def test_make_row_gives_a_model_separate_sequences():
    """Logits of a LLaMA with these position ids and without a mask equal those of each sequence
    alone.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            attn_implementation="sdpa",
        )
    ).eval()
    rng = np.random.default_rng(0)
    pieces = [rng.integers(3, 64, size).astype(np.int32) for size in (5, 1, 7)]
    ids, _, positions = (
        torch.from_numpy(array)[None].long()
        for array in make_row([(piece, piece) for piece in pieces], 16, pad_id=0)
    )
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        start = 0
        for piece in pieces:
            alone = model(input_ids=torch.from_numpy(piece)[None].long()).logits[0]
            assert torch.allclose(packed[start : start + len(piece)], alone, atol=1e-5)
            start += len(piece)
