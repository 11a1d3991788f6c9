"""`StepBatches`: equal for any number of workers, any first step and any number of ranks."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import jpeg, write_tar
from real_processes import run_process

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


def dataset(shards: Path, **settings: Any) -> PairDataset:
    return PairDataset(
        Pairs(f"{shards}/*.tar"), TrainTransform(16), BlipCaption(), seed=1, **settings
    )


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    assert set(left) == set(right) == {"image", "caption", "key", "index"}
    return (
        torch.equal(left["image"], right["image"])
        and torch.equal(left["index"], right["index"])
        and left["caption"] == right["caption"]
        and left["key"] == right["key"]
    )


@pytest.mark.process
@pytest.mark.parametrize("mixed", [False, True])
def test_at_any_step_with_workers(shards: Path, mixed, no_workers_left: None):
    order = MixedOrder([13, 27], [2.0, 1.0], 4) if mixed else None
    alone = StepBatches(dataset(shards), 6, seed=3, order=order)
    expected = [alone.at(step) for step in range(9)]  # 54 samples of 40: into the second epoch
    with StepBatches(dataset(shards), 6, seed=3, order=order, workers=2) as pair:
        for step in (0, 1, 2, 3, 7, 8, 4):
            state = torch.get_rng_state()
            batch = pair.at(step)
            assert same(batch, expected[step]) and batch["image"].shape == (6, 3, 16, 16)
            assert torch.equal(
                torch.get_rng_state(), state
            )  # loading does not use the global generator
        pair.close()
        assert same(pair.at(4), expected[4])
        assert alone.wait_seconds > 0 and pair.wait_seconds > 0


def test_at_of_several_ranks(shards: Path):
    single = StepBatches(dataset(shards), 8, seed=2)
    for world in (2, 4):
        ranks = [
            StepBatches(dataset(shards), 8 // world, seed=2, rank=rank, world=world)
            for rank in range(world)
        ]
        for step in (0, 1, 4, 5, 9):  # step 4 ends the first epoch of 40
            complete = single.at(step)
            parts = [rank.at(step) for rank in ranks]
            assert [key for part in parts for key in part["key"]] == complete["key"]
            assert torch.equal(torch.cat([part["image"] for part in parts]), complete["image"])


@pytest.mark.process
def test_bad_samples_of_workers(tmp_path, no_workers_left: None):
    write_tar(
        tmp_path / "d.tar",
        [
            {
                "__key__": f"{n:03d}",
                "jpg": jpeg(n) if n not in (4, 9) else jpeg(n)[:-400],
                "json": {"caption": f"Number {n}"},
            }
            for n in range(16)
        ],
    )
    file = tmp_path / "log"

    def log(line: str) -> None:  # to a file, which lines of workers reach, too
        with file.open("a") as out:
            out.write(line + "\n")

    with StepBatches(dataset(tmp_path, log=log), 4, seed=0, workers=2) as batches:
        keys = [
            key for step in range(12) for key in batches.at(step)["key"]
        ]  # three epochs: both workers read both
    assert sorted(key for key, _ in batches.bad_samples()) == ["004", "009"]
    logged = file.read_text().splitlines()
    assert len(logged) == 2 and all("d.tar" in line and "truncated" in line for line in logged)
    assert (
        keys.count("004") == keys.count("009") == 0 and keys.count("005") == keys.count("010") == 6
    )


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 1])
def test_at_raises_from_workers(tmp_path, workers, no_workers_left: None):
    path = write_tar(
        tmp_path / "x.tar",
        [
            {"__key__": f"{n:03d}", "jpg": jpeg(n), "json": {"title" if n == 5 else "caption": "x"}}
            for n in range(8)
        ],
    )
    with StepBatches(
        dataset(tmp_path, max_bad_in_a_row=1), 2, seed=0, shuffle=False, workers=workers
    ) as batches:
        assert batches.at(0)["key"] == ["000", "001"] and batches.at(1)["key"] == ["002", "003"]
        with pytest.raises(DataError) as error:
            batches.at(2)
        assert f"{path}: sample 005: has no caption: " in str(error.value) and "\n" not in str(
            error.value
        )
        assert batches.at(3)["key"] == ["006", "007"]


@pytest.mark.process
def test_at_after_a_worker_was_killed(shards: Path, no_workers_left: None):
    with StepBatches(dataset(shards), 2, seed=0, workers=2) as batches:
        batches.at(0)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(
            DataError, match=r"worker process was killed .* resume from the last checkpoint"
        ) as error:
            for step in range(1, 40):  # prefetched batches are still returned
                batches.at(step)
        assert "\n" not in str(error.value)


@pytest.mark.process
@pytest.mark.timeout(60)
def test_a_worker_killed_inside_the_writing_of_a_result(no_workers_left: None):
    results = load(lambda job: bytes(1 << 20), range(9), workers=1)  # a pipe holds 64 KiB
    next(results)
    time.sleep(1)  # the worker fills the pipe with the next result
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match="worker process was killed"):
        next(results)


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
    """As in a container: docker gives /dev/shm 64 MB."""
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
    assert done.returncode == 2 and "/dev/shm: docker run --shm-size" in done.stderr, done.stderr
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr


SCRIPT = """
import hashlib, multiprocessing, os, signal, sys
from seed_multimodal.data.formats.pairs import Pairs
from seed_multimodal.data.stream.loader import StepBatches
from seed_multimodal.data.stream.pairs_dataset import PairDataset
from seed_multimodal.images.augment import TrainTransform

dataset = PairDataset(Pairs(f"{sys.argv[1]}/*.tar"), TrainTransform(16), seed=1)
batches = StepBatches(dataset, 6, seed=3, workers=2)
for step in range(9):
    batch = batches.at(step)
    digest = hashlib.sha256(batch["image"].numpy().tobytes()).hexdigest()
    print(step, digest, *batch["key"], flush=True)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
raise KeyError("a training that fails")
"""


@pytest.mark.process
@pytest.mark.parametrize(("end", "code"), [("killed", -9), ("failed", 1)])
def test_workers_end_with_their_program(shards: Path, still_running, end, code):
    """A process with workers is killed or fails: its batches equal those of this process, its
    workers end.
    """
    done = run_process(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(shards), end],
        timeout=150,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == code, done.stderr
    *lines, workers = done.stdout.splitlines()
    batches = StepBatches(
        PairDataset(Pairs(f"{shards}/*.tar"), TrainTransform(16), seed=1), 6, seed=3
    )
    for step in range(9):
        batch = batches.at(step)
        digest = hashlib.sha256(batch["image"].numpy().tobytes()).hexdigest()
        assert lines[step] == " ".join([str(step), digest, *batch["key"]])
    assert len(workers.split()) == 2 and still_running(workers.split()) == []
