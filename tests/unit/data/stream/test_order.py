"""`Order` and `Chunks`: each position by one process once, sources by their weights."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yaml_tables import read_tables

from seed_multimodal.data.stream.order import (
    Chunks,
    DistinctOrder,
    EpochOrder,
    MixedOrder,
    Order,
    Span,
    share,
    uniform,
    unread,
)

WORLDS = st.integers(1, 4)


def order(**options) -> Order:
    """Sources of 24 and 60 records, of which the second has blocks of 10."""
    settings = {"weights": [3.0, 1.0], "sizes": [24, 60], "seed": 5, "cycles": [2, None]}
    return Order(**{**settings, "blocks": [0, 10], **options})


def test_chunks_of_neighbours():
    # A process has full runs; before the end of the data single positions, so that none waits.
    assert Chunks(3, 17, 2, 1, 3).take_all(9) == [Span(5, 7), Span(11, 13), Span(16, 17)]
    assert [span.start for span in Chunks(0, 7, 1, 0, 2).take_all(9)] == [0, 2, 4, 6]
    # At least four runs of each process in an epoch.
    assert [order().chunks(1, 0, world, 0).run for world in (1, 2, 3, 99)] == [10, 7, 5, 1]
    assert order().chunks(0, 0, 1, 0).run == 1
    assert order(run=16).chunks(0, 0, 4, 0).run == 16
    assert (order().chunks(0, 0, 1, 7).first, order().chunks(0, 0, 1, 0).limit) == (7, 48)
    assert order().chunks(1, 0, 1, 0).limit > 10**12


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


@pytest.mark.parametrize("case", read_tables(__file__), ids=str)
def test_choose(case):
    three = Order([1, 2, 1], [9, 9, 9], 0, [None] * 3, [1, 1, 1], case["turns"])
    assert three.choose(4, case["delivered"], case["available"]) == case["source"]


def test_choose_by_weight():
    # A resumed run must choose as before, also after an update.
    draws = [uniform(5, index) < 0.5 for index in range(8)]
    assert "".join("01"[draw] for draw in draws) == "10101011"
    assert uniform(5, 0) != uniform(6, 0)
    chosen = [order().choose(number, [0, 0], [True, True]) for number in range(4000)]
    for start in range(0, 4000, 400):
        assert abs(chosen[start : start + 400].count(0) - 300) <= 40
    assert chosen[:12] == [0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]


# ---- samples at positions

SETS = st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 100)), min_size=1, max_size=4)
SHARDS = st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any)


@given(SHARDS, st.integers(0, 40), st.data())
def test_epoch_order_is_a_permutation(sizes, block, data):
    total = sum(sizes)

    def order():
        return EpochOrder(total, 5, shard_sizes=np.array(sizes), block=block)

    # Each epoch has each sample once.
    expected = order().samples(0, 3 * total)
    for epoch in range(3):
        samples = [sample for at_epoch, sample in expected if at_epoch == epoch]
        assert sorted(samples) == list(range(total))

    # A run that resumes anywhere, also before the last position, reads the same samples.
    resumed = order()
    for _ in range(3):
        start = data.draw(st.integers(0, 3 * total - 1))
        end = data.draw(st.integers(start + 1, 3 * total))
        assert resumed.samples(start, end - start) == expected[start:end]


@pytest.mark.parametrize(
    "order, start, samples",
    [
        (EpochOrder(7, 3), 5, "01 05 16 13 11 14"),
        (EpochOrder(7, 3, shard_sizes=np.array([3, 4]), block=4), 5, "05 04 11 14 16 13"),
        (MixedOrder([3, 5], [2.0, 1.0], 3), 4, "05 10 12 04 11 21"),
        (DistinctOrder(EpochOrder(7, 3), 5), 3, "03 04 01 05 16 13"),
    ],
)
def test_recorded_orders(order, start, samples):
    """Runs that were begun with an earlier version resume in their order."""
    expected = [(int(epoch), int(index)) for epoch, index in samples.split()]
    assert order.samples(start, 6) == expected


def test_epoch_order_without_blocks():
    # Of one shard or none, processes take single positions; else each would see other samples.
    sizes = np.array([2, 3])
    assert [EpochOrder(5, 0).block, EpochOrder(5, 0, shuffle=False, shard_sizes=sizes).block] == [
        0,
        0,
    ]


def test_epoch_order_in_blocks():
    sizes = np.full(50, 1000)
    samples = EpochOrder(50_000, 0, shard_sizes=sizes, block=2000).samples(0, 50_000)
    order = np.array(samples)[:, 1]
    for start in range(0, 50_000, 2000):
        block = order[start : start + 2000]
        # Few reads of a shard: ten pieces of 200 neighbours, and a good mixture: of many shards.
        assert len(np.unique(block // 200)) == 10
        assert len(np.unique(block // 1000)) >= 5
    assert np.abs(np.corrcoef(order, np.arange(50_000))[0, 1]) < 0.3
    assert np.abs(np.corrcoef(order[:2000], np.arange(2000))[0, 1]) < 0.1


def test_epoch_order_memory_of_100_million_samples():
    # Each data worker has one; an array of all indices would be 800 MB.
    tracemalloc.start()
    order = EpochOrder(100_000_000, 0, shard_sizes=np.full(10_000, 10_000))
    for position in (0, 1_000_000, 100_000_000, 100_500_000):
        assert len(order.samples(position, 50)) == 50
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6, peak


@given(SETS, st.integers(0, 10**12), st.integers(1, 300))
def test_mixed_order_follows_the_weights(sets, start, count):
    totals, weights = map(list, zip(*sets, strict=True))
    indices = [index for _, index in MixedOrder(totals, weights, 0).samples(start, count)]
    drawn = np.searchsorted(np.cumsum(totals), indices, side="right")
    counts = np.bincount(drawn, minlength=len(sets))
    assert np.abs(counts - count * np.array(weights) / sum(weights)).max() <= 2


@given(SETS, st.integers(0, 300), st.integers(1, 100))
def test_mixed_order_reads_each_set_epoch_by_epoch(sets, start, count):
    totals, weights = map(list, zip(*sets, strict=True))
    order = MixedOrder(totals, weights, 3).samples(0, 400)
    first = 0
    for total in totals:
        of_set = [
            (epoch, index - first) for epoch, index in order if first <= index < first + total
        ]
        assert [epoch for epoch, _ in of_set] == [rank // total for rank in range(len(of_set))]
        for begin in range(0, len(of_set) - total + 1, total):
            epoch_samples = [sample for _, sample in of_set[begin : begin + total]]
            assert sorted(epoch_samples) == list(range(total))
        first += total

    # From any position, as after a resume.
    resumed = MixedOrder(totals, weights, 3).samples(start, count)
    assert resumed == order[start : start + count]


# Shards, nodes, ranks of a node, run of a rank, cycles (None: endless).
DEALS = [
    ([7] * 20, 4, 2, 3, None),
    ([50, 1, 9, 30, 2, 8], 3, 1, 4, 2),
    ([5, 4], 4, 2, 1, 3),  # cuts split the shards
    ([3, 2], 8, 1, 2, None),  # less than a record a node
]


@pytest.mark.parametrize("sizes, nodes, ranks, run, cycles", DEALS)
def test_deal_reads_each_record_once_an_epoch(sizes, nodes, ranks, run, cycles):
    total = sum(sizes)
    deal = Order([1.0], [total], 0, [cycles], [0], run=run, nodes=nodes).deal(0, nodes * ranks)
    order = EpochOrder(total, 5, shard_sizes=np.array(sizes), block=20, deal=deal)
    samples = order.samples(0, 2 * total)
    for epoch in range(2):
        part = samples[epoch * total : (epoch + 1) * total]
        assert sorted(part) == [(epoch, index) for index in range(total)]
    assert [order.samples(position, 1)[0] for position in range(2 * total)] == samples
    distinct = DistinctOrder(order, min(total, 6))
    for start in range(0, 2 * total, distinct.size):
        step = [index for _, index in distinct.samples(start, distinct.size)]
        assert len(set(step)) == distinct.size


def test_deal_gives_a_shard_to_few_nodes():
    sizes = np.full(500, 100)
    deal = Order([1.0], [50_000], 0, [None], [0], run=10, nodes=25).deal(0, 50)
    samples = EpochOrder(50_000, 0, shard_sizes=sizes, block=1000, deal=deal).samples(0, 100_000)
    for epoch in range(2):
        pairs = {
            (samples[position][1] // 100, deal.run_at(position)[0])
            for position in range(epoch * 50_000, (epoch + 1) * 50_000)
        }
        assert len(pairs) <= 1.2 * 500


def test_deal_of_mixed_sets():
    # One set in shards, one without, one smaller than the number of nodes.
    order = MixedOrder(
        [400, 100, 3], [4, 1, 0.1], 3, shard_sizes=[np.full(20, 20), None, np.array([2, 1])]
    )
    order.deal = Order([1.0], [503], 0, [None], [0], run=5, nodes=4).deal(0, 8)
    samples = order.samples(0, 480)
    assert [order.samples(position, 1)[0] for position in range(480)] == samples
    assert len(set(samples)) == 480  # none twice in the first epoch of a set
    counts = np.histogram([index for _, index in samples], [0, 400, 500, 503])[0]
    assert np.abs(counts - 480 * np.array([4, 1, 0.1]) / 5.1).max() <= 2 * 4
