"""Sets drawn by weights: proportions everywhere, each sample in its turn, the same for any ranks, workers and start."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from seed_multimodal.data.stream.order import EpochOrder, MixedOrder
from seed_multimodal.data.stream.step_batches import StepBatches

TOTALS, WEIGHTS = [30, 1000, 7], [5.0, 2.0, 1.0]


def flat(order: MixedOrder, start: int, count: int) -> list[tuple[int, int]]:
    """(epoch, index) of each position."""
    return [(epoch, int(index)) for epoch, indices in order.parts(start, count) for index in indices]


def sources(indices: list[int]) -> np.ndarray:
    return np.bincount(np.searchsorted(np.cumsum(TOTALS), indices, side="right"), minlength=3)


def test_mixed_order_proportions() -> None:
    drawn = sources([index for _, index in flat(MixedOrder(TOTALS, WEIGHTS, 0), 0, 8000)])
    assert np.abs(drawn - 1000 * np.array(WEIGHTS)).max() <= 1
    for start in (0, 17, 4096, 123_456_789_012):
        for count in (8, 64, 333):
            part = sources([index for _, index in flat(MixedOrder(TOTALS, WEIGHTS, 0), start, count)])
            assert np.abs(part - count * np.array(WEIGHTS) / 8).max() <= 2


@pytest.mark.parametrize("weights", [WEIGHTS, [1e-9, 1.0, 3.0], [1.0, 1e-4, 1e-5]])
def test_mixed_order_epochs(weights: list[float]) -> None:
    """Whatever the weights, a set's draws are its samples once in each of its epochs, without a gap."""
    seen: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
    for epoch, index in flat(MixedOrder(TOTALS, weights, 3), 0, 4000):
        number = int(np.searchsorted(np.cumsum(TOTALS), index, side="right"))
        seen[number].append((epoch, index - sum(TOTALS[:number])))
    for number, total in enumerate(TOTALS):
        draws = seen[number]
        assert [epoch for epoch, _ in draws] == [place // total for place in range(len(draws))]
        for first in range(0, len(draws) - total + 1, total):
            assert sorted(index for _, index in draws[first:first + total]) == list(range(total))
    orders = [[index for epoch, index in seen[0] if epoch == number] for number in (0, 1)]
    assert len(orders[1]) < 30 or orders[0] != orders[1]


def test_mixed_order_at_any_position() -> None:
    whole = flat(MixedOrder(TOTALS, WEIGHTS, 1), 0, 3000)
    order = MixedOrder(TOTALS, WEIGHTS, 1)
    for start, count in ((2990, 10), (0, 7), (511, 400), (1, 1)):
        assert flat(order, start, count) == whole[start:start + count]
    assert flat(MixedOrder(TOTALS, WEIGHTS, 2), 0, 3000) != whole
    started = time.process_time()
    far = MixedOrder([50_000, 200_000], [1.0, 3.0], 0, sizes=[None, [20_000] * 10], block=1000)
    assert len(flat(far, 10**12, 256)) == 256 and time.process_time() - started < 2


class Pairs:
    """Samples that say which they are."""

    def __len__(self) -> int:
        return sum(TOTALS)

    def get(self, index: int, epoch: int) -> dict[str, Any]:
        return {"index": torch.tensor(index), "epoch": epoch}


def batches(**more: Any) -> StepBatches:
    return StepBatches(Pairs(), more.pop("size", 12), seed=4, order=MixedOrder(TOTALS, WEIGHTS, 4), **more)


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_step_batches_of_a_mixed_order() -> None:
    whole = [torch.stack([batch["index"], batch["epoch"]]) for batch in map(batches().at, range(20))]
    ranks = [batches(size=4, rank=rank, world=3) for rank in range(3)]
    with batches(workers=2) as prefetched:
        for step in (0, 1, 2, 11, 12, 3):
            again = prefetched.at(step)
            assert torch.equal(torch.stack([again["index"], again["epoch"]]), whole[step])
            shares = [rank.at(step) for rank in ranks]
            assert torch.equal(torch.cat([share["index"] for share in shares]), whole[step][0])
            for share in shares:  # every rank has its proportions
                assert np.abs(sources(share["index"].tolist()) - 4 * np.array(WEIGHTS) / 8).max() <= 2


@pytest.mark.parametrize("block", [0, 20])
def test_epoch_order_has_every_sample_once(block: int) -> None:
    order = EpochOrder(103, 5, sizes=[40, 1, 0, 62], block=block)
    epochs = []
    for epoch in range(3):
        parts = order.parts(epoch * 103, 103)
        assert [number for number, _ in parts] == [epoch]
        assert sorted(parts[0][1].tolist()) == list(range(103))
        epochs.append(parts[0][1].tolist())
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    assert EpochOrder(103, 5, sizes=[40, 1, 0, 62], block=block).parts(206, 103)[0][1].tolist() == epochs[2]
    assert EpochOrder(103, 6, sizes=[40, 1, 0, 62], block=block).parts(0, 103)[0][1].tolist() != epochs[0]


def test_epoch_order_in_blocks() -> None:
    sizes = np.full(50, 1000)
    order = EpochOrder(50_000, 0, sizes=sizes, block=2000).parts(0, 50_000)[0][1]
    shards = order // 1000
    for start in range(0, 50_000, 2000):
        run = np.sort(order[start:start + 2000])
        assert len(np.unique(run // 200)) == 10  # ten pieces of 200 neighbours
        assert len(np.unique(shards[start:start + 2000])) >= 5
    assert np.abs(np.corrcoef(order, np.arange(50_000))[0, 1]) < 0.3
    inside = order[:2000]
    assert np.abs(np.diff(inside)).min() >= 1 and np.abs(np.corrcoef(inside, np.arange(2000))[0, 1]) < 0.1


def test_epoch_order_without_shuffling() -> None:
    parts = EpochOrder(5, 0, shuffle=False).parts(3, 9)
    assert [(epoch, indices.tolist()) for epoch, indices in parts] == [(0, [3, 4]), (1, [0, 1, 2, 3, 4]), (2, [0, 1])]


def test_epoch_order_at_any_position() -> None:
    sizes, rng = [40, 1, 0, 700, 62, 333], np.random.default_rng(0)
    for block in (0, 1, 10, 5000):
        order = EpochOrder(1136, 3, sizes=sizes, block=block, keep=2)
        whole = np.concatenate([indices for _, indices in order.parts(0, 3 * 1136)])
        for start in rng.integers(0, 3 * 1136 - 300, 40).tolist():
            found = EpochOrder(1136, 3, sizes=sizes, block=block).parts(start, 300)
            assert np.concatenate([indices for _, indices in found]).tolist() == whole[start:start + 300].tolist()


def test_epoch_order_memory_of_100_million_samples() -> None:
    """Each data worker holds its own; an array of it would be 800 MB."""
    sizes = np.full(10_000, 10_000)
    tracemalloc.start()
    order = EpochOrder(100_000_000, 0, sizes=sizes, block=10_000, keep=2)
    for position in (0, 1_000_000, 100_000_000, 100_500_000):
        assert len(order.parts(position, 50)[0][1]) == 50
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6, peak
