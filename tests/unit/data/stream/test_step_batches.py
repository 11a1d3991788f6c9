"""Batches by step number: the same for any number of workers, any start, and any way to split them over ranks."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seed_multimodal.data.formats.pairs import Pairs
from seed_multimodal.data.stream.order import EpochOrder
from seed_multimodal.data.stream.pair_dataset import PairDataset
from seed_multimodal.data.stream.step_batches import StepBatches, join_batches
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.images.augment import TrainTransform
from seed_multimodal.language.words import BlipCaption
from seed_multimodal.training.schedules import batch_indices

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


def dataset(shards: Path, **settings: Any) -> PairDataset:
    return PairDataset(Pairs(f"{shards}/*.tar"), TrainTransform(16), BlipCaption(), seed=1, **settings)


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    assert set(left) == set(right) == {"image", "caption", "key", "index"}
    return (torch.equal(left["image"], right["image"]) and torch.equal(left["index"], right["index"])
            and left["caption"] == right["caption"] and left["key"] == right["key"])


# ---- the order


@pytest.mark.parametrize("block", [0, 20])
def test_each_epoch_has_every_sample_once(block: int) -> None:
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


def test_the_order_without_blocks_is_that_of_batch_indices() -> None:
    order = EpochOrder(37, 4)
    for step in (0, 3, 9, 2):
        mine = np.concatenate([indices for _, indices in order.parts(step * 10, 10)])
        assert mine.tolist() == batch_indices(step, 10, 37, 4).tolist()


def test_blocks_keep_reads_together_and_mix_shards() -> None:
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


def test_an_order_without_shuffling() -> None:
    parts = EpochOrder(5, 0, shuffle=False).parts(3, 9)
    assert [(epoch, indices.tolist()) for epoch, indices in parts] == [(0, [3, 4]), (1, [0, 1, 2, 3, 4]), (2, [0, 1])]


def test_millions_of_samples() -> None:
    sizes = np.full(200, 10_000)
    order = EpochOrder(2_000_000, 0, sizes=sizes, block=10_000)
    started = time.process_time()
    order.parts(1_999_990, 20)
    assert time.process_time() - started < 5
    assert sorted(order.parts(2_000_000, 2_000_000)[0][1][::1000])[0] >= 0


# ---- batches


@pytest.mark.process
def test_workers_change_nothing(shards: Path, no_workers_left: None) -> None:
    alone = StepBatches(dataset(shards), 6, seed=3)
    with StepBatches(dataset(shards), 6, seed=3, workers=2) as pair:
        for step in range(9):  # 54 samples of 40: into the second epoch
            torch.manual_seed(step)
            mine, theirs = alone.at(step), pair.at(step)
            assert same(mine, theirs) and mine["image"].shape == (6, 3, 16, 16)
            after = torch.rand(1)
            torch.manual_seed(step)
            assert torch.equal(torch.rand(1), after)  # loading draws nothing from the global generator
        assert alone.wait_seconds > 0 and pair.wait_seconds > 0


@pytest.mark.process
def test_workers_end_with_the_block_whatever_ends_it(shards: Path, no_workers_left: None) -> None:
    with (pytest.raises(KeyError), StepBatches(dataset(shards), 6, seed=3, workers=2) as batches):
        batches.at(0)
        workers = multiprocessing.active_children()
        raise KeyError("a training that fails")
    assert len(workers) == 2
    for worker in workers:
        worker.join(10)
    assert [worker.exitcode for worker in workers] == [0, 0]


@pytest.mark.process
def test_a_fresh_object_continues_anywhere(shards: Path, no_workers_left: None) -> None:
    whole = StepBatches(dataset(shards), 5, seed=0)
    expected = [whole.at(step) for step in range(12)]
    with StepBatches(dataset(shards), 5, seed=0, workers=1) as jumping:
        for step in (7, 8, 9, 2, 3, 11):
            assert same(jumping.at(step), expected[step])
        jumping.close()
        assert same(jumping.at(4), expected[4])


@pytest.mark.parametrize("block", [None, 0, 10])
def test_two_ranks_share_the_order_of_one_process(shards: Path, block: int | None) -> None:
    single = StepBatches(dataset(shards), 8, seed=2, block=block)
    ranks = [StepBatches(dataset(shards), 4, seed=2, rank=rank, world=2, block=block) for rank in range(2)]
    four = [StepBatches(dataset(shards), 2, seed=2, rank=rank, world=4, block=block) for rank in range(4)]
    for step in (0, 1, 4, 5, 9):  # step 4 ends the first epoch of 40
        whole = single.at(step)
        for parts in ([r.at(step) for r in ranks], [r.at(step) for r in four]):
            assert same(join_batches(parts), whole)


def test_epochs_have_other_views(shards: Path) -> None:
    batches = StepBatches(dataset(shards), 40, seed=0)
    first, second = batches.at(0), batches.at(1)
    assert sorted(first["key"]) == sorted(second["key"]) and first["key"] != second["key"]
    place = second["key"].index(first["key"][0])
    assert not torch.equal(first["image"][0], second["image"][place])


@pytest.mark.process
def test_a_collate_of_ones_own(shards: Path, no_workers_left: None) -> None:
    def keys(samples: list[dict[str, Any]]) -> list[str]:
        return [sample["key"] for sample in samples]

    for workers in (0, 1):
        with StepBatches(dataset(shards), 3, seed=0, shuffle=False, collate=keys, workers=workers) as batches:
            assert batches.at(0) == ["00000", "00001", "00002"] and batches.at(13) == ["00039", "00000", "00001"]


class Squares:
    """Whole batches at once, and no optional attribute."""

    def __len__(self) -> int:
        return 10

    def get(self, index: int, epoch: int) -> Tensor:
        raise AssertionError("get_batch is there")

    def get_batch(self, indices: np.ndarray, epoch: int) -> dict[str, Any]:
        return {"value": torch.from_numpy(indices ** 2), "epoch": [epoch] * len(indices), "pair": (torch.ones(1), [7])}


@pytest.mark.process
def test_datasets_that_make_batches(no_workers_left: None) -> None:
    for workers in (0, 2):
        with StepBatches(Squares(), 4, seed=0, shuffle=False, workers=workers) as batches:
            batch = batches.at(2)
            assert batch["value"].tolist() == [64, 81, 0, 1] and batch["epoch"] == [0, 0, 1, 1]
            assert batch["pair"][0].shape == (2,) and batch["pair"][1] == [7, 7]
            assert batches.bad_samples() == []
    with pytest.raises(TypeError, match="str"):
        join_batches(["a", "b"])


# ---- what goes wrong


@pytest.fixture
def damaged(tmp_path: Path, jpeg: Callable, write_tar: Callable) -> Path:
    samples = [{"__key__": f"{n:03d}", "jpg": jpeg(n) if n not in (4, 9) else jpeg(n)[:-400],
                "json": {"caption": f"Number {n}"}} for n in range(16)]
    write_tar(tmp_path / "d.tar", samples)
    return tmp_path


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_come_home_from_workers(damaged: Path, workers: int, no_workers_left: None) -> None:
    file = damaged / "log"

    def log(line: str) -> None:  # to a file, so that a line from a worker would be seen too
        with file.open("a") as out:
            out.write(line + "\n")

    with StepBatches(dataset(damaged, log=log), 4, seed=0, workers=workers) as batches:
        keys = [key for step in range(12) for key in batches.at(step)["key"]]  # three epochs, both workers meet both
    assert sorted(key for key, _ in batches.bad_samples()) == ["004", "009"]
    logged = file.read_text().splitlines()
    assert len(logged) == 2 and all("d.tar" in line and "truncated" in line for line in logged)
    assert keys.count("004") == keys.count("009") == 0 and keys.count("005") == keys.count("010") == 6


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 1])
def test_refusals_arrive_as_their_sentence(tmp_path: Path, jpeg: Callable, write_tar: Callable, workers: int,
                                           no_workers_left: None) -> None:
    samples = [{"__key__": f"{n:03d}", "jpg": jpeg(n), "json": {"title" if n == 5 else "caption": "x"}}
               for n in range(8)]
    path = write_tar(tmp_path / "x.tar", samples)
    with StepBatches(dataset(tmp_path, max_bad_in_a_row=1), 2, seed=0, shuffle=False, workers=workers) as batches:
        assert batches.at(0)["key"] == ["000", "001"] and batches.at(1)["key"] == ["002", "003"]
        with pytest.raises(DataError) as error:
            batches.at(2)
        said = str(error.value)
        assert f"{path}: sample 005: has no caption key 'caption'" in said and "\n" not in said
        assert batches.at(3)["key"] == ["006", "007"]


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"rank": 2, "world": 2}, {"rank": -1}, {"workers": -1},
                                      {"seed": -1}, {"block": -5}])
def test_settings_that_make_no_sense(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings)).split("_")[0]):
        StepBatches(Squares(), **{"batch_size": 2, "seed": 0, **settings})
    with pytest.raises(ConfigError, match="step -1"):
        StepBatches(Squares(), 2, seed=0).at(-1)


SCRIPT = """
import hashlib, os, signal, sys
from seed_multimodal.data.stream.pair_dataset import PairDataset
from seed_multimodal.data.formats.pairs import Pairs
from seed_multimodal.data.stream.step_batches import StepBatches
from seed_multimodal.images.augment import TrainTransform

data = PairDataset(Pairs(f"{sys.argv[1]}/*.tar"), TrainTransform(16), seed=1)
batches = StepBatches(data, 6, seed=3, workers=2)
for step in range(100):
    batch = batches.at(step)
    print(step, hashlib.sha256(batch["image"].numpy().tobytes()).hexdigest(), *batch["key"], flush=True)
    if step == 8:
        print(*batches.worker_pids(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.process
def test_a_run_killed_in_the_midst(shards: Path, still_running: Callable) -> None:
    """A real process with workers, killed by SIGKILL: its batches were those of here; its workers end by themselves."""
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, str(shards)], capture_output=True, text=True,
                            timeout=150, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert killed.returncode == -9, killed.stderr
    *lines, workers = killed.stdout.splitlines()
    batches = StepBatches(PairDataset(Pairs(f"{shards}/*.tar"), TrainTransform(16), seed=1), 6, seed=3)
    for step in range(9):
        batch = batches.at(step)
        digest = hashlib.sha256(batch["image"].numpy().tobytes()).hexdigest()
        assert lines[step] == " ".join([str(step), digest, *batch["key"]])
    assert still_running(workers.split()) == []


FULL = """
import os, signal, time
from seed_multimodal.data.stream.step_batches import StepBatches

class Long:
    def __len__(self):
        return 64

    def get(self, index, epoch):
        return "x" * 200_000

batches = StepBatches(Long(), 4, seed=0, workers=2)
batches.at(0)
time.sleep(1)  # by now both workers wait for room in the pipe
print(*batches.worker_pids(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker that waits to hand over is not ended")
def test_workers_that_wait_to_hand_a_batch_over_end_with_their_trainer(still_running: Callable) -> None:
    killed = subprocess.Popen([sys.executable, "-W", "ignore", "-c", FULL], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert killed.stdout is not None
    workers = killed.stdout.readline().split()
    assert killed.wait(60) == -9 and len(workers) == 2
    left = still_running(workers, 20)
    for pid in left:
        os.kill(pid, 9)
    killed.stdout.close()
    assert not left


def test_a_seed_may_be_any_whole_number() -> None:
    (_, order), = EpochOrder(50, 10 ** 30).parts(0, 50)
    assert sorted(order.tolist()) == list(range(50)) and order.tolist() != list(range(50))
