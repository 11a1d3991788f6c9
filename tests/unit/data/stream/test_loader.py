"""`StepBatches`: equal for any number of workers, any first step and any number of ranks."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from data_files import jpeg, write_tar
from real_processes import run_process
from waiting import wait_until

from seed_multimodal.data.formats.pairs import Pairs
from seed_multimodal.data.stream.loader import StepBatches, load
from seed_multimodal.data.stream.pairs_dataset import PairDataset
from seed_multimodal.data.stream.sampler import MixedOrder
from seed_multimodal.errors import DataError
from seed_multimodal.images.augment import TrainTransform
from seed_multimodal.models.seed.captions import BlipCaption

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than cores


def dataset(shards: Path, **settings) -> PairDataset:
    return PairDataset(
        Pairs(f"{shards}/*.tar"), TrainTransform(16), BlipCaption(), seed=1, **settings
    )


def same(left: dict, right: dict) -> bool:
    images = torch.equal(left.pop("image"), right["image"])
    return images and all(str(left[key]) == str(right[key]) for key in left)


@pytest.mark.process
@pytest.mark.parametrize("mixed", [False, True])
def test_at_any_step_with_workers(shards, mixed, no_workers_left):
    order = MixedOrder([13, 27], [2.0, 1.0], 4) if mixed else None
    alone = StepBatches(dataset(shards), 6, seed=3, order=order)
    expected = [alone.at(step) for step in range(9)]  # 54 samples of 40: into the second epoch
    with StepBatches(dataset(shards), 6, seed=3, order=order, workers=2) as pair:
        for step in (0, 1, 2, 3, 7, 8, 4):
            state = torch.get_rng_state()
            batch = pair.at(step)
            assert batch["image"].shape == (6, 3, 16, 16)
            assert same(batch, expected[step])
            # Loading does not use the generator that a training draws from.
            assert torch.equal(torch.get_rng_state(), state)
        pair.close()
        assert same(pair.at(4), expected[4])


@pytest.mark.parametrize("world", [2, 4])
def test_at_of_several_ranks(shards, world):
    # Together they see the batch of a single process; step 4 ends the first epoch.
    single = StepBatches(dataset(shards), 8, seed=2)
    ranks = [
        StepBatches(dataset(shards), 8 // world, seed=2, rank=rank, world=world)
        for rank in range(world)
    ]
    for step in (0, 1, 4, 5, 9):
        complete = single.at(step)
        parts = [rank.at(step) for rank in ranks]
        assert [key for part in parts for key in part["key"]] == complete["key"]
        assert torch.equal(torch.cat([part["image"] for part in parts]), complete["image"])


@pytest.mark.parametrize("order", [None, MixedOrder([13, 27], [1.0, 1.0], 4)])
def test_distinct_batches_of_several_ranks(shards, order):
    # Behind an epoch's end, too: in a contrast, an image would be its own negative.
    settings = {"seed": 2, "order": order, "distinct": True}
    ranks = [StepBatches(dataset(shards), 14, rank=rank, world=2, **settings) for rank in (0, 1)]
    for step in range(4):
        keys = [key for rank in ranks for key in rank.at(step)["key"]]
        assert len(set(keys)) == 28


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
def test_bad_samples_of_workers(tmp_path, no_workers_left):
    path = spoiled_shard(tmp_path, {4, 9})
    log_file = tmp_path / "log"

    def log(line):  # to a file, which lines of workers reach, too
        with log_file.open("a") as out:
            out.write(line + "\n")

    # Three epochs: both workers read both bad samples. Those of an earlier run do not end this one.
    data = dataset(tmp_path, log=log)
    data.load_state_dict({"bad": {"unreadable image": {"count": 99, "first": []}}})
    with StepBatches(data, 4, seed=0, workers=2) as batches:
        keys = Counter(key for step in range(12) for key in batches.at(step)["key"])
    # All replacements are counted, each sample is named once.
    assert data.bad.total == 99 + 6
    logged = sorted(log_file.read_text().splitlines())
    assert len(logged) == 2
    assert f"{path}: sample 004" in logged[0]
    assert f"{path}: sample 009" in logged[1]
    # The next good sample replaces each.
    assert (keys["004"], keys["009"], keys["005"], keys["010"]) == (0, 0, 6, 6)


@pytest.mark.process
def test_at_raises_from_workers(tmp_path, no_workers_left):
    path = spoiled_shard(tmp_path, {5})
    data = dataset(tmp_path, max_bad_in_a_row=1)
    with StepBatches(data, 2, seed=0, shuffle=False, workers=1) as batches:
        assert batches.at(1)["key"] == ["002", "003"]
        with pytest.raises(DataError, match=f"{path}: sample 005"):
            batches.at(2)
        # A caller may go on behind it.
        assert batches.at(3)["key"] == ["006", "007"]


@pytest.mark.process
@pytest.mark.timeout(60)
def test_load_after_a_worker_was_killed(no_workers_left):
    # As by the kernel, when memory runs out: the run ends with a message instead of waiting.
    results = load(lambda job: bytes(1 << 20), range(100), workers=1)
    next(results)
    time.sleep(1)  # it writes the next result: a pipe holds 64 KiB
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match="worker"):
        list(results)


FULL_MEMORY = """
import torch
from seed_multimodal.data.stream.loader import load
from seed_multimodal.entry import run_guarded

def read(job):
    return torch.zeros(1_000_000)

raise SystemExit(run_guarded("program", False, lambda: len(list(load(read, range(20), 2)))))
"""


@pytest.mark.process
@pytest.mark.timeout(200)
def test_load_without_room_in_shared_memory():
    # As in a container: docker gives /dev/shm 64 MB.
    unshare = shutil.which("unshare")
    mount = "mount -t tmpfs -o size=2m none /dev/shm"
    if (
        unshare is None
        or subprocess.run([unshare, "-Urm", "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("this system allows no user mounts")
    program = [sys.executable, "-c", FULL_MEMORY]
    done = run_process(
        [unshare, "-Urm", "sh", "-c", f'{mount} && exec "$@"', "sh", *program],
        timeout=150,
    )
    assert done.returncode == 2, done.stderr
    assert "--shm-size" in done.stderr
    assert "Traceback" not in done.stderr


def runs(pid: str) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()


SCRIPT = """
import itertools, multiprocessing, os, signal, sys
from seed_multimodal.data.stream.loader import load

results = load(str, itertools.count(), 2)
next(results)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
raise KeyError("a training that fails")
"""


@pytest.mark.process
@pytest.mark.parametrize("end, code", [("killed", -9), ("failed", 1)])
def test_workers_end_with_their_program(end, code):
    # Else each stopped run leaves processes that hold memory.
    done = run_process(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, end],
        timeout=150,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == code, done.stderr
    workers = done.stdout.split()
    assert len(workers) == 2
    wait_until(lambda: not any(map(runs, workers)), 30)
