"""Packing: the sequences of a row, its arrays, and cutting of long sequences."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yaml_tables import read_tables

from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.stream.packing import best_fit, make_row, split_long
from seed_multimodal.language.vocabulary import IGNORE_INDEX, ImageVocabulary

VOCABULARY = ImageVocabulary(n_text=100, n_codes=50, tokens_per_image=4)
IMAGE = [VOCABULARY.boi_id, 101, 102, 103, 104, VOCABULARY.eoi_id]
PAD = 9
# Lengths of a document's texts; 0: an image.
SEGMENTS = st.lists(st.one_of(st.just(0), st.integers(1, 50)), min_size=1, max_size=12)


@given(st.integers(5, 40), st.data())
def test_best_fit_fills_the_row_best(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=8))
    chosen = best_fit(lengths, capacity)
    # Each sequence at most once, and always the oldest: none waits for ever.
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    subsets = itertools.chain.from_iterable(
        itertools.combinations(lengths[1:], size) for size in range(len(lengths))
    )
    totals = [lengths[0] + sum(subset) for subset in subsets]
    filled = sum(lengths[index] for index in chosen)
    assert filled == max(total for total in totals if total <= capacity)


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(0, 5), st.booleans())
def test_make_row_loses_and_doubles_no_token(lengths, n_padding, packed):
    # Labels differ from ids, and each token is another one.
    rows = [np.arange(start * 10, start * 10 + n) + 20 for start, n in enumerate(lengths)]
    sequences = [(row.astype(np.int32), (row + 100).astype(np.int32)) for row in rows]
    total = sum(lengths)
    arrays = make_row(sequences, total + n_padding, PAD, packed)
    assert {array.dtype for array in arrays} == {np.dtype(np.int32)}
    ids, labels, positions = (array.tolist() for array in arrays)

    joined = [token for row in rows for token in row.tolist()]
    assert ids == joined + [PAD] * n_padding
    expected = [token + 100 for token in joined] + [IGNORE_INDEX] * n_padding
    if packed:
        # Its first token would be predicted from the sequence before.
        for start in itertools.accumulate([0, *lengths[:-1]]) if lengths else ():
            expected[start] = IGNORE_INDEX
    assert labels == expected
    restarts = [*lengths, n_padding] if packed else [total + n_padding]
    assert positions == [position for n in restarts for position in range(n)]
    # The caller's sequences are unchanged.
    assert all(
        (row + 100).tolist() == pair[1].tolist() for row, pair in zip(rows, sequences, strict=True)
    )


def document(segments: list[int]) -> np.ndarray:
    """`<s>`, texts of these lengths (0: an image), `</s>`."""
    rng = np.random.default_rng(sum(segments))
    parts = [rng.integers(10, 100, size) if size else IMAGE for size in segments]
    return np.concatenate([[1], *parts, [2]]).astype(np.int32)


@given(SEGMENTS, st.integers(len(IMAGE), 40))
def test_split_long_learns_each_token_once(segments, length):
    ids = document(segments)
    # Labels are positions, so that each token of a piece is known.
    pieces = split_long(ids, np.arange(len(ids), dtype=np.int32), length, VOCABULARY)
    targets = []
    for piece_ids, positions in pieces:
        assert 0 < len(piece_ids) <= length
        # Neighbours of the document, and whole images only.
        assert positions.tolist() == list(range(positions[0], positions[0] + len(positions)))
        assert piece_ids.tolist() == ids[positions].tolist()
        for token in (VOCABULARY.boi_id, VOCABULARY.eoi_id):
            assert (piece_ids == token).sum() == (piece_ids == 101).sum()
        targets += positions[1:].tolist()

    assert targets == sorted(set(targets))
    for lost in set(range(1, len(ids))) - set(targets):
        # Only the first token after an image where a piece ends, or an image that needs the row.
        after_image = ids[lost - 1] == VOCABULARY.eoi_id
        needs_the_row = ids[lost] == VOCABULARY.boi_id and length == len(IMAGE)
        assert after_image or needs_the_row


@pytest.mark.parametrize("case", read_tables(__file__), ids=str)
def test_split_long_cuts_where_texts_and_images_end(case):
    ids = document(case["segments"])
    pieces = split_long(ids, ids, 16, VOCABULARY)
    assert [len(piece) for piece, _ in pieces] == case["lengths"]


def test_split_long_of_an_image_longer_than_a_row():
    ids = document([3, 0, 3])
    with pytest.raises(BadRecord) as error:
        split_long(ids, ids, len(IMAGE) - 1, VOCABULARY)
    assert error.value.kind == "image too long"


def test_split_long_of_a_control_word_in_a_text():
    # `<img>` in a text opens no image: the text after it may be longer than a row.
    ids = np.array([1, VOCABULARY.boi_id, *range(10, 30), 2], np.int32)
    pieces = split_long(ids, ids, 8, VOCABULARY)
    assert [token for piece, _ in pieces for token in piece[1:].tolist()] == ids[1:].tolist()
