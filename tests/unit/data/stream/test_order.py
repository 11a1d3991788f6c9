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
from seed_multimodal.errors import ConfigError, DataError

TOTALS, WEIGHTS = [30, 1000, 7], [5.0, 2.0, 1.0]


def flat(order: MixedOrder, start: int, count: int) -> list[tuple[int, int]]:
    """(epoch, index) of each position."""
    return [(epoch, int(index)) for epoch, indices in order.parts(start, count) for index in indices]


def sources(indices: list[int]) -> np.ndarray:
    return np.bincount(np.searchsorted(np.cumsum(TOTALS), indices, side="right"), minlength=3)


def test_every_stretch_has_its_proportions() -> None:
    drawn = sources([index for _, index in flat(MixedOrder(TOTALS, WEIGHTS, 0), 0, 8000)])
    assert np.abs(drawn - 1000 * np.array(WEIGHTS)).max() <= 1
    for start in (0, 17, 4096, 123_456_789_012):
        for count in (8, 64, 333):
            part = sources([index for _, index in flat(MixedOrder(TOTALS, WEIGHTS, 0), start, count)])
            assert np.abs(part - count * np.array(WEIGHTS) / 8).max() <= 2


@pytest.mark.parametrize("weights", [WEIGHTS, [1e-9, 1.0, 3.0], [1.0, 1e-4, 1e-5]])
def test_each_set_goes_through_its_own_epochs(weights: list[float]) -> None:
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


def test_any_position_is_reached_at_once() -> None:
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
def test_ranks_workers_and_restarts_change_nothing() -> None:
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


@pytest.mark.parametrize("weights", [[1.0, 0.0, 1.0], [1.0, -2.0, 1.0], [1.0, float("nan"), 1.0], [1.0, 1.0]])
def test_weights_that_make_no_sense(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="as many positive weights"):
        MixedOrder(TOTALS, weights, 0)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(DataError, match="Set 2 of the 3 of the mixture is empty"):
        MixedOrder([3, 0, 4], [1, 1, 1], 0)


def whole_epoch(sizes: list[int], block: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, made at once: pieces of a tenth of a block over all shards, then samples in each block."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    if not block:
        return torch.randperm(sum(sizes), generator=generator).numpy()
    piece = max(1, block // 10)
    starts = np.cumsum([0, *sizes[:-1]])
    pieces = [np.arange(first + place, first + min(place + piece, size))
              for first, size in zip(starts, sizes, strict=True) for place in range(0, size, piece)]
    order = np.concatenate([pieces[place] for place in torch.randperm(len(pieces), generator=generator).tolist()])
    for start in range(0, len(order), block):
        run = order[start:start + block]
        order[start:start + block] = run[torch.randperm(len(run), generator=generator).numpy()]
    return order


@pytest.mark.parametrize("block", [0, 1, 7, 10, 100, 5000])
def test_an_epoch_computed_where_it_is_asked_for_is_the_whole_one(block: int) -> None:
    sizes, draw = [40, 1, 0, 700, 62, 333], np.random.default_rng(block)
    epochs = [whole_epoch(sizes, block, 3, epoch) for epoch in range(3)]
    endless, total = np.concatenate(epochs), sum(sizes)
    order = EpochOrder(total, 3, sizes=sizes, block=block, keep=2)
    for _ in range(200):
        start = int(draw.integers(0, len(endless)))
        count = int(draw.integers(1, min(300, len(endless) - start) + 1))
        parts = order.parts(start, count)
        assert np.concatenate([indices for _, indices in parts]).tolist() == endless[start:start + count].tolist()
        assert all(indices.dtype == np.int64 for _, indices in parts)
        assert parts[0][0] == start // total


def test_the_order_of_a_hundred_million_samples_takes_little_memory() -> None:
    """Each data worker holds its own; an array of it would be 800 MB."""
    sizes = np.full(10_000, 10_000)
    tracemalloc.start()
    order = EpochOrder(100_000_000, 0, sizes=sizes, block=10_000, keep=2)
    for position in (0, 1_000_000, 100_000_000, 100_500_000):
        assert len(order.parts(position, 50)[0][1]) == 50
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6, peak
