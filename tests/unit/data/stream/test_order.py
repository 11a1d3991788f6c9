"""`Order` and `Chunks`: each position by one process once, sources by their weights."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seed_multimodal.data.stream.order import Chunks, Order, Span, share, uniform, unread

WORLDS = st.integers(1, 4)


def order(**options) -> Order:
    """Sources of 24 and 60 records, of which the second has blocks of 10."""
    settings = {"weights": [3.0, 1.0], "sizes": [24, 60], "seed": 5, "cycles": [2, None]}
    return Order(**{**settings, "blocks": [0, 10], **options})


def test_chunks_of_neighbours():
    # A process has full runs; before the end of the data single positions, so that none waits.
    assert [*Chunks(3, 17, 2, rank=1, world=3)] == [5, 6, 11, 12, 16]
    assert [*Chunks(0, 7, 1, rank=0, world=2)] == [0, 2, 4, 6]
    # At least four runs of each process in an epoch.
    assert [order().chunks(1, 0, world).run for world in (1, 2, 3, 99)] == [10, 7, 5, 1]
    assert order().chunks(0, 0, 1).run == 1
    assert order(run=16).chunks(0, 0, 4).run == 16
    assert (order().chunks(0, 0, 1, 7).first, order().chunks(0, 0, 1).limit) == (7, 48)
    assert order().chunks(1, 0, 1).limit > 10**12


def test_take():
    chunks = Chunks(0, 12, 4, rank=0, world=2, left=[Span(50, 53), Span(60, 61, [1])])
    spans = chunks.take_all(6)
    assert spans == [Span(50, 53), Span(60, 61, [1]), Span(0, 2)]
    assert (chunks.take(9), chunks.take(9), chunks.ended) == (Span(2, 4), Span(8, 9), False)
    assert [span.start for span in chunks.take_all(9)] == [10]
    assert (chunks.take(), chunks.ended) == (None, True)


@given(
    st.integers(0, 90),
    st.integers(1, 7),
    st.lists(st.tuples(WORLDS, st.lists(st.integers(0, 30), min_size=4, max_size=4)), max_size=4),
    WORLDS,
)
def test_positions_of_any_number_of_processes(limit, run, phases, last):
    # Whatever each of them has read before, nothing is lost or read twice.
    taken = []
    first, left = 0, []
    for world, counts in [*phases, (last, [999] * 4)]:
        ranks = [Chunks(first, limit, run, rank, world) for rank in range(world)]
        for rank, chunks in enumerate(ranks):
            chunks.left = share(left, rank, world)
            for span in chunks.take_all(counts[rank]):
                taken += range(span.start, span.stop)
        first, left = unread(ranks, [])
        assert left == sorted(left, key=lambda span: span.start)
    assert left == []
    assert sorted(taken) == list(range(limit))


def test_unread_with_records_that_wait():
    ranks = [Chunks(0, 40, 4, rank, 2) for rank in range(2)]
    for chunks, count in zip(ranks, (6, 1), strict=True):
        chunks.take_all(count)
    # The second round of runs has begun; a piece of the record at 1 was not used.
    first, spans = unread(ranks, [Span(1, 2, [1])])
    assert (first, spans) == (16, [Span(1, 2, [1]), Span(5, 8), Span(10, 12), Span(12, 16)])
    parts = [share(spans, rank, 3) for rank in range(3)]
    assert parts == [[Span(1, 2, [1]), Span(5, 7)], [Span(7, 8), Span(10, 12)], [Span(12, 16)]]


@pytest.mark.parametrize(
    "turns, delivered, available, source",
    [
        ("concat", [9, 0, 0], [True, True, True], 0),
        ("concat", [9, 0, 0], [False, True, True], 1),
        ("mux_longest", [1, 0, 0], [True, True, True], 1),
        ("mux_longest", [1, 1, 1], [False, True, True], 1),
        ("mux_longest", [2, 1, 1], [True, False, False], 0),
        ("sample", [0, 0, 0], [False, True, False], 1),
        ("even", [0, 0, 0], [False, False, False], None),
    ],
)
def test_choose(turns, delivered, available, source):
    three = Order([1, 2, 1], [9, 9, 9], 0, [None] * 3, [1, 1, 1], turns)
    assert three.choose(4, delivered, available) == source


def test_choose_by_weight():
    # A resumed run must choose as before, also after an update.
    assert [uniform(5, index) < 0.5 for index in range(8)] == [
        True,
        False,
        True,
        False,
        True,
        False,
        True,
        True,
    ]
    assert uniform(5, 0) != uniform(6, 0)
    for turns, deviation, first in (
        ("sample", 40, [0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("even", 2, [0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1]),
    ):
        weighted = order(turns=turns)
        chosen = [weighted.choose(number, [0, 0], [True, True]) for number in range(4000)]
        for start in range(0, 4000, 400):
            assert abs(chosen[start : start + 400].count(0) - 300) <= deviation
        assert chosen[:12] == first
