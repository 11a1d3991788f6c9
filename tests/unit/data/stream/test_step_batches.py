"""`StepBatches`: equal for any number of workers, any first step and any number of ranks.

Samples that cannot be used are skipped, and no other is lost or used twice.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import jpeg, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from seed_multimodal.data.formats.bad_records import BROKEN, RecordNote
from seed_multimodal.data.formats.pairs import Pairs
from seed_multimodal.data.stream.pairs_dataset import PairDataset
from seed_multimodal.data.stream.step_batches import ListedSamples, SampleDataset, StepBatches
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.augment import TrainTransform
from seed_multimodal.models.seed.captions import BlipCaption

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than cores


def dataset(shards: Path) -> PairDataset:
    return PairDataset(Pairs(f"{shards}/*.tar"), TrainTransform(16), BlipCaption(), seed=1)


def same(left: dict, right: dict) -> bool:
    images = torch.equal(left.pop("image"), right["image"])
    return images and all(str(left[key]) == str(right[key]) for key in left)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("weights", [(), (2.0, 1.0)])
def test_at_any_step_with_workers(shards, weights, no_workers_left):
    parts = [PairDataset(Pairs(shards / f"s-00{n}.tar"), TrainTransform(16)) for n in (0, 3)]
    alone = StepBatches(parts, 6, seed=3, weights=weights)
    expected = [alone.at(step) for step in range(9)]  # 54 samples of 32: into the second epoch
    with StepBatches(parts, 6, seed=3, weights=weights, workers=2) as pair:
        # Back to the first steps, as for a k-means start, and on.
        for step in (0, 1, 2, 0, 1, 3, 4):
            state = torch.get_rng_state()
            batch = pair.at(step)
            assert batch["image"].shape == (6, 3, 16, 16)
            assert same(batch, expected[step])
            # Loading does not use the generator that a training draws from.
            assert torch.equal(torch.get_rng_state(), state)
        pair.close()
        assert same(pair.at(5), expected[5])


class Numbers(SampleDataset[tuple[int, int]]):
    """(epoch, number) of samples, of which some are broken."""

    def __init__(self, numbers: range, bad: frozenset[int] = frozenset()) -> None:
        self.numbers = numbers
        self.usable = {number for number in numbers if number % 100 not in bad}

    def __len__(self) -> int:
        return len(self.numbers)

    def get(self, index: int, epoch: int = 0) -> tuple[int, int]:
        number = self.numbers[index]
        if number not in self.usable:
            raise ValueError("broken")
        return epoch, number

    def broken(self, index: int, error: Exception) -> RecordNote:
        return RecordNote(BROKEN, str(error), f"sample {self.numbers[index]}")


def batches_of(parts: list[Numbers], batch_size: int, **options) -> StepBatches:
    options = {"seed": 2, "collate": list, "log": None, "max_bad_in_a_row": 99, **options}
    return StepBatches(parts, batch_size, **options)


@pytest.mark.parametrize("weights", [(), (2.0, 1.0)])
@pytest.mark.parametrize("world", [2, 4])
def test_at_of_several_ranks(world, weights):
    # Together they see the batch of a single process; step 4 ends the first epoch.
    parts = [Numbers(range(13)), Numbers(range(100, 127))]
    single = batches_of(parts, 8, weights=weights)
    ranks = [
        batches_of(parts, 8 // world, weights=weights, rank=rank, world=world)
        for rank in range(world)
    ]
    for step in (0, 1, 4, 5, 9):
        assert [sample for rank in ranks for sample in rank.at(step)] == single.at(step)


def saved(batches: StepBatches) -> dict:
    """The state as a checkpoint stores it."""
    return json.loads(json.dumps(batches.state_dict()))


# Sizes of sets, and which samples are broken.
SETS = st.lists(
    st.tuples(st.integers(1, 30), st.frozensets(st.integers(1, 30))), min_size=1, max_size=3
)
# Processes, batch size and steps.
PHASE = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(0, 9))


@settings(max_examples=60)
@given(SETS, st.booleans(), st.lists(PHASE, min_size=1, max_size=4))
def test_each_sample_once_an_epoch(sets, is_mixed, phases):
    # Whatever is broken, and however often a run resumes, also in another number of processes.
    parts = [
        Numbers(range(100 * part, 100 * part + size), bad) for part, (size, bad) in enumerate(sets)
    ]
    weights = range(1, len(sets) + 1) if is_mixed else ()
    used = Counter[tuple[int, int]]()
    states: list[dict] = []
    for world, batch_size, steps in phases:
        ranks = [
            batches_of(parts, batch_size, weights=weights, rank=rank, world=world)
            for rank in range(world)
        ]
        for batches in ranks:
            if states:
                batches.load_state_dict(states[::-1])
            for step in range(batches.next_step, batches.next_step + steps):
                batch = batches.at(step)
                assert len(batch) == batch_size
                used.update(batch)
        states = list(map(saved, ranks))
    assert not used or max(used.values()) == 1

    # Up to the first position that a process has yet to read.
    left = min(batches.stream.progress[0].chunks.next_span().start for batches in ranks)
    numbers = [number for part in parts for number in part.numbers]
    usable = set().union(*(part.usable for part in parts))
    for epoch, index in ranks[0].stream.sources[0].order.samples(0, left):
        assert (epoch, numbers[index]) in used or numbers[index] not in usable

    # What was skipped is counted once, too.
    n_skipped = sum(batches.n_bad for batches in ranks)
    draws = sum(
        source["counts"]["draws"] for state in states for source in state["batches"]["sources"]
    )
    assert draws == used.total() + n_skipped


@pytest.mark.parametrize("sizes, weights", [((40,), ()), ((13, 27), ()), ((13, 27), (1.0, 1.0))])
def test_distinct_batches_of_several_ranks(sizes, weights):
    # Behind an epoch's end, too: in a contrast, an image would be its own negative.
    parts = [Numbers(range(100 * part, 100 * part + size)) for part, size in enumerate(sizes)]
    options = {"weights": weights, "distinct": True, "world": 2}
    ranks = [batches_of(parts, 14, rank=rank, **options) for rank in (0, 1)]
    for step in range(4):
        numbers = [number for rank in ranks for _, number in rank.at(step)]
        assert len(set(numbers)) == 28


def test_resume_without_a_position():
    # Checkpoints of earlier versions have counts only: the position follows from the step.
    parts = [Numbers(range(40))]
    straight = batches_of(parts, 6)
    expected = [straight.at(step) for step in range(9)]
    resumed = batches_of(parts, 6)
    resumed.load_state_dict([{"bad": {"unusable value": {"count": 3, "first": []}}}])
    assert [resumed.at(step) for step in (7, 8)] == expected[7:]


def test_resume_with_other_data(tmp_path):
    # Else a run would go on with other images in silence.
    path = spoiled_shard(tmp_path, set())
    state = saved(StepBatches([dataset(tmp_path)], 1, seed=0))
    StepBatches([dataset(tmp_path)], 1, seed=0).load_state_dict([state])
    path.write_bytes(path.read_bytes().replace(b"Number", b"Letter"))
    with pytest.raises(ConfigError, match="checksums"):
        StepBatches([dataset(tmp_path)], 1, seed=0).load_state_dict([state])
    with pytest.raises(ConfigError, match="records"):
        batches_of([Numbers(range(2))], 1).load_state_dict([state])
    listed = [batches_of([ListedSamples([{"prompt": text}])], 1) for text in ("a fox", "a cat")]
    with pytest.raises(ConfigError, match="checksums"):
        listed[0].load_state_dict([saved(listed[1])])


def test_resume_with_other_weights():
    # Positions stand for other samples: some would be lost, others used twice.
    parts = [Numbers(range(9))] * 2
    state = saved(batches_of(parts, 2, weights=(1, 1)))
    resumed = batches_of(parts, 2, weights=(2, 1))
    with pytest.raises(ConfigError, match="weights"):
        resumed.load_state_dict([state])
    del state["batches"]["data"]["weights"]  # as of earlier versions
    resumed.load_state_dict([state])
    # Mixed sets are always shuffled.
    with pytest.raises(ConfigError, match="shuffle"):
        batches_of(parts, 2, weights=(2, 1), shuffle=False)


def spoiled_shard(folder, bad: set[int]) -> Path:
    """A tar of 16 samples, some with an image that is cut off."""
    samples = [
        {
            "__key__": f"{n:03d}",
            "jpg": jpeg(n)[: -400 if n in bad else None],
            "json": {"caption": f"Number {n}"},
        }
        for n in range(16)
    ]
    return write_tar(folder / "d.tar", samples)


@pytest.mark.process
def test_bad_samples_are_skipped(tmp_path, no_workers_left):
    path = spoiled_shard(tmp_path, {4, 9})
    logged: list[str] = []
    with StepBatches([dataset(tmp_path)], 7, seed=0, workers=2, log=logged.append) as batches:
        keys = Counter(key for step in range(6) for key in batches.at(step)["key"])
        # Three epochs of 14: each is counted as often as it was met, and named once.
        assert batches.n_bad in (4, 5, 6)
    assert keys == {f"{n:03d}": 3 for n in range(16) if n not in (4, 9)}
    assert len(logged) == 2
    assert f"{path}: sample 004" in min(logged)
    assert f"{path}: sample 009" in max(logged)


class ShardedNumbers(Numbers):
    shard_sizes = np.full(10, 6)


@pytest.mark.parametrize("world, nodes", [(4, 2), (2, 1), (6, 3)])
def test_dealt_shards_after_resume(world, nodes):
    # 36 of 60 samples are read on two nodes; the next ones are the epoch's others.
    parts = [ShardedNumbers(range(60))]
    before = [batches_of(parts, 3, rank=rank, world=4, nodes=2) for rank in range(4)]
    read = [sample for step in range(3) for rank in before for sample in rank.at(step)]
    states = [saved(rank) for rank in before]
    after = [batches_of(parts, 3, rank=rank, world=world, nodes=nodes) for rank in range(world)]
    for rank in after:
        rank.load_state_dict(states)
    while len(read) < 60:
        for rank in after:
            read += rank.at(rank.next_step)
    assert sorted(read[:60]) == [(0, number) for number in range(60)]
    if world == 4:
        go_on = [sample for step in (3, 4) for rank in before for sample in rank.at(step)]
        assert read[36:60] == go_on


def test_dealt_shards_of_other_versions():
    parts = [ShardedNumbers(range(60))]
    single = batches_of(parts, 6)
    state = saved(single)
    del state["batches"]["deals"]
    nodes = [batches_of(parts, 3, rank=rank, world=2, nodes=2) for rank in range(2)]
    for rank in nodes:
        rank.load_state_dict([state])
    assert [sample for rank in nodes for sample in rank.at(0)] == single.at(0)
    state["batches"]["deals"] = [[3, 0, 2, 60]]
    with pytest.raises(ConfigError, match="damaged"):
        nodes[0].load_state_dict([state])
