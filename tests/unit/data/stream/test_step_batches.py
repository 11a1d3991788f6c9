"""Batches by step number: the same for any number of workers, any start, and any way to split them over ranks."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seed_multimodal.data.formats.pairs import Pairs
from seed_multimodal.data.stream.pair_dataset import PairDataset
from seed_multimodal.data.stream.step_batches import StepBatches
from seed_multimodal.errors import DataError
from seed_multimodal.images.augment import TrainTransform
from seed_multimodal.seed.captions import BlipCaption

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


def dataset(shards: Path, **settings: Any) -> PairDataset:
    return PairDataset(Pairs(f"{shards}/*.tar"), TrainTransform(16), BlipCaption(), seed=1, **settings)


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    assert set(left) == set(right) == {"image", "caption", "key", "index"}
    return (torch.equal(left["image"], right["image"]) and torch.equal(left["index"], right["index"])
            and left["caption"] == right["caption"] and left["key"] == right["key"])


@pytest.mark.process
def test_at_with_workers(shards: Path, no_workers_left: None) -> None:
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
def test_at_any_step(shards: Path, no_workers_left: None) -> None:
    whole = StepBatches(dataset(shards), 5, seed=0)
    expected = [whole.at(step) for step in range(12)]
    with StepBatches(dataset(shards), 5, seed=0, workers=1) as jumping:
        for step in (7, 8, 9, 2, 3, 11):
            assert same(jumping.at(step), expected[step])
        jumping.close()
        assert same(jumping.at(4), expected[4])


@pytest.mark.parametrize("block", [None, 0, 10])
def test_at_of_several_ranks(shards: Path, block: int | None) -> None:
    single = StepBatches(dataset(shards), 8, seed=2, block=block)
    ranks = [StepBatches(dataset(shards), 4, seed=2, rank=rank, world=2, block=block) for rank in range(2)]
    four = [StepBatches(dataset(shards), 2, seed=2, rank=rank, world=4, block=block) for rank in range(4)]
    for step in (0, 1, 4, 5, 9):  # step 4 ends the first epoch of 40
        whole = single.at(step)
        for parts in ([r.at(step) for r in ranks], [r.at(step) for r in four]):
            assert [key for part in parts for key in part["key"]] == whole["key"]
            assert torch.equal(torch.cat([part["image"] for part in parts]), whole["image"])


class Squares:
    """Whole batches at once, and no optional attribute."""

    def __len__(self) -> int:
        return 10

    def get(self, index: int, epoch: int) -> Tensor:
        raise AssertionError("get_batch is there")

    def get_batch(self, indices: np.ndarray, epoch: int) -> dict[str, Any]:
        return {"value": torch.from_numpy(indices ** 2), "epoch": [epoch] * len(indices)}


@pytest.mark.process
def test_at_with_get_batch(no_workers_left: None) -> None:
    for workers in (0, 2):
        with StepBatches(Squares(), 4, seed=0, shuffle=False, workers=workers) as batches:
            batch = batches.at(2)
            assert batch["value"].tolist() == [64, 81, 0, 1] and batch["epoch"] == [0, 0, 1, 1]
            assert batches.bad_samples() == []


# ---- what goes wrong


@pytest.fixture
def damaged(tmp_path: Path, jpeg: Callable, write_tar: Callable) -> Path:
    samples = [{"__key__": f"{n:03d}", "jpg": jpeg(n) if n not in (4, 9) else jpeg(n)[:-400],
                "json": {"caption": f"Number {n}"}} for n in range(16)]
    write_tar(tmp_path / "d.tar", samples)
    return tmp_path


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_of_workers(damaged: Path, workers: int, no_workers_left: None) -> None:
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
def test_at_raises_from_workers(tmp_path: Path, jpeg: Callable, write_tar: Callable, workers: int,
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
def test_at_before_and_after_sigkill(shards: Path, still_running: Callable) -> None:
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
