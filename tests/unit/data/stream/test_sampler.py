"""Orders of samples: each once per epoch, shares by weight, equal from any position."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from seed_multimodal.data.formats.layout import StorageLayout
from seed_multimodal.data.stream.sampler import BLOCK_BYTES, EpochOrder, MixedOrder

TOTALS = [30, 1000, 7]
WEIGHTS = [5.0, 2.0, 1.0]


def flat(order: EpochOrder | MixedOrder, start: int, count: int) -> list[tuple[int, int]]:
    """(epoch, index) of each position."""
    return [
        (epoch, int(index)) for epoch, indices in order.parts(start, count) for index in indices
    ]


def test_mixed_order_proportions():
    for start in (0, 17, 123_456_789_012):
        for count in (8, 64, 8000):
            indices = [index for _, index in flat(MixedOrder(TOTALS, WEIGHTS, 0), start, count)]
            counts = np.bincount(
                np.searchsorted(np.cumsum(TOTALS), indices, side="right"), minlength=3
            )
            assert np.abs(counts - count * np.array(WEIGHTS) / 8).max() <= 2


@pytest.mark.parametrize("weights", [WEIGHTS, [1e-9, 1.0, 3.0]])
def test_mixed_order_epochs(weights):
    """With any weights, each epoch of a set contains each of its samples once."""
    samples_of_sets: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
    for epoch, index in flat(MixedOrder(TOTALS, weights, 3), 0, 4000):
        set_index = int(np.searchsorted(np.cumsum(TOTALS), index, side="right"))
        samples_of_sets[set_index].append((epoch, index - sum(TOTALS[:set_index])))
    for set_index, total in enumerate(TOTALS):
        samples = samples_of_sets[set_index]
        assert [epoch for epoch, _ in samples] == [rank // total for rank in range(len(samples))]
        for first in range(0, len(samples) - total + 1, total):
            assert sorted(index for _, index in samples[first : first + total]) == list(
                range(total)
            )


def test_mixed_order_at_any_position():
    expected = flat(MixedOrder(TOTALS, WEIGHTS, 1), 0, 3000)
    order = MixedOrder(TOTALS, WEIGHTS, 1)
    for start, count in ((2990, 10), (0, 7), (511, 400), (1, 1)):
        assert flat(order, start, count) == expected[start : start + count]
    assert flat(MixedOrder(TOTALS, WEIGHTS, 2), 0, 3000) != expected


@pytest.mark.parametrize("block", [0, 1, 20, 5000])
def test_epoch_order(block):
    layout = StorageLayout.of_shards([40, 1, 0, 700, 62, 333])

    def make(seed: int = 5) -> EpochOrder:
        return EpochOrder(1136, seed, layout=layout, block=block)

    expected = flat(make(), 0, 3 * 1136)
    epochs = [[index for at_epoch, index in expected if at_epoch == epoch] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(1136)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and flat(make(6), 0, 1136) != expected[:1136]
    order = make()
    for start in np.random.default_rng(0).integers(0, 3 * 1136 - 300, 40).tolist():
        assert flat(order, start, 300) == expected[start : start + 300]


def test_epoch_order_in_blocks():
    order = EpochOrder(
        50_000, 0, layout=StorageLayout.of_shards(np.full(50, 1000)), block=2000
    ).parts(0, 50_000)[0][1]
    for start in range(0, 50_000, 2000):
        run = np.sort(order[start : start + 2000])
        assert len(np.unique(run // 200)) == 10  # ten pieces of 200 neighbours
        assert len(np.unique(run // 1000)) >= 5
    assert np.abs(np.corrcoef(order, np.arange(50_000))[0, 1]) < 0.3
    assert np.abs(np.corrcoef(order[:2000], np.arange(2000))[0, 1]) < 0.1


def test_epoch_order_without_shuffling():
    parts = EpochOrder(5, 0, shuffle=False).parts(3, 9)
    assert [(epoch, indices.tolist()) for epoch, indices in parts] == [
        (0, [3, 4]),
        (1, [0, 1, 2, 3, 4]),
        (2, [0, 1]),
    ]


def test_epoch_order_memory_of_100_million_samples():
    """Each data worker has one; an array of all indices would be 800 MB."""
    tracemalloc.start()
    order = EpochOrder(100_000_000, 0, layout=StorageLayout.of_shards(np.full(10_000, 10_000)))
    for position in (0, 1_000_000, 100_000_000, 100_500_000):
        assert len(order.parts(position, 50)[0][1]) == 50
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6, peak


@pytest.mark.parametrize("rows", [100, 500, 1000, 5000])
def test_epoch_order_of_row_groups(rows):
    """A block holds whole groups that fit into the cache: each group is read once in an epoch."""
    total = 50_000
    sizes = np.full(total // rows, rows)
    layout = StorageLayout(sizes, sizes * (BLOCK_BYTES // 1001))
    order = EpochOrder(total, 3, layout=layout)
    for epoch in range(2):
        ((_, indices),) = order.parts(epoch * total, total)
        assert sorted(indices) == list(range(total))
        groups = indices // rows
        last = {group: rank for rank, group in enumerate(groups)}
        first = {group: rank for rank, group in reversed(list(enumerate(groups)))}
        assert max(last[group] - first[group] for group in last) <= max(1000, rows)
        assert rows > 500 or np.mean(groups[1:] != groups[:-1]) > 0.4  # several groups are mixed
    assert order.block_size == max(1000, rows)


def test_epoch_order_of_tables_and_shards():
    layout = StorageLayout.joined(
        [
            StorageLayout(np.array([3000, 10]), np.array([BLOCK_BYTES * 3, 5])),
            StorageLayout.of_shards([70, 25_000]),
        ]
    )
    order = EpochOrder(28_080, 0, layout=layout)
    expected = flat(order, 0, 2 * 28_080)
    for epoch in range(2):
        assert sorted(index for at_epoch, index in expected if at_epoch == epoch) == list(
            range(28_080)
        )
    assert flat(EpochOrder(28_080, 0, layout=layout), 31_000, 500) == expected[31_000:31_500]
