"""Orders of samples: each once per epoch, shares by weight, equal from any position."""

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from seed_multimodal.data.stream.epochs import EpochOrder

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


def test_epoch_order_depends_on_seed_and_epoch():
    # The same order in each epoch trains worse.
    sizes = np.array([400, 300])
    samples = EpochOrder(700, 1, shard_sizes=sizes).samples(0, 1400)
    _, order = np.array(samples).reshape(2, 700, 2).T
    others = EpochOrder(700, 2, shard_sizes=sizes).samples(0, 700)
    for other in (order[:, 1], np.array(others)[:, 1]):
        assert np.mean(order[:, 0] == other) < 0.05


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
