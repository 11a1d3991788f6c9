"""What DeepSpeed leaves behind, and its shards in another number of processes (unequal numbers of
forward passes: e2e/test_trainers.py)."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import loop_toy as toy
import pytest
import torch
import torch.distributed as dist
import zero_toy
from llm_runs import environment
from real_processes import run_checked
from torch import nn
from warm_processes import PYTHON

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.optimizers import MuonWithAdamW
from seed_multimodal.training.task import StageTask
from seed_multimodal.training.zero_engine import ZeroEngine, resolve_deepspeed_config

CPU = torch.device("cpu")
SETTINGS = StageSettings(max_steps=4, precision="bf16")


@pytest.fixture(scope="module")
def lone_group() -> Iterator[ProcessGroup]:
    """torch.distributed's group of this process; one for all tests, since DeepSpeed keeps it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ProcessGroup()
    dist.destroy_process_group()


@pytest.mark.process
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_engine_leaves_the_process_as_it_was(lone_group, stage):
    # A second run, an evaluation or another program in the same process.
    pytest.importorskip("deepspeed")
    linear = nn.functional.linear
    module, _ = toy.toy_model()
    module[0].bias.data = module[0].bias.data.half()  # weights may be as in their files
    task = StageTask("toy", module, SETTINGS)
    task.deepspeed, _ = resolve_deepspeed_config(
        {"zero_optimization": {"stage": stage}}, SETTINGS, world=1, rows=2, hidden_size=4
    )
    engine = ZeroEngine(task, lone_group, CPU)
    try:
        assert module[0].weight.dtype == torch.bfloat16
    finally:
        engine.close()
    assert nn.functional.linear is linear  # ZeRO-3's does not take quantised weights
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(os.environ)


def test_zero_engine_refuses_muon(lone_group):
    # It updates whole matrices, which ZeRO cuts into flat pieces.
    task = StageTask("toy", toy.toy_model()[0], SETTINGS)
    task.optimizer = MuonWithAdamW(task.module, 1e-3, 0.0)
    with pytest.raises(ConfigError, match="muon"):
        task.deepspeed = {"zero_optimization": {"stage": 2}}
        ZeroEngine(task, lone_group, CPU)


ALL_RUNS = "4:0:2 3:2:4 4:4:6 1:6:8"


@pytest.fixture(scope="module")
def shards(request, tmp_path_factory) -> Path:
    """The folder of runs of `zero_toy` with a stage, one after the other."""
    pytest.importorskip("deepspeed")
    stage, runs = request.param
    folder = tmp_path_factory.mktemp("shards")
    command = [PYTHON, zero_toy.__file__, str(folder), str(stage), *runs.split()]
    run_checked(command, timeout=500, env=environment())
    return folder


def after_runs(*parameters) -> pytest.MarkDecorator:
    """A test of shards of these stages and runs; in the suite of ZeRO-3."""
    rows = [pytest.param((3, "4:0:2 3:2:4"), id="shrink")]
    rows += [pytest.param(row, id=f"zero{row[0]}", marks=pytest.mark.nightly) for row in parameters]
    return pytest.mark.parametrize("shards", rows, indirect=True)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(600)
@after_runs((1, ALL_RUNS), (2, ALL_RUNS), (3, ALL_RUNS))
def test_zero_engine_continues_in_another_number_of_processes(shards):
    # A node is lost, and comes back.
    losses = [json.loads(line) for line in (shards / "losses.jsonl").read_text().splitlines()]
    plain = zero_toy.engine(0)
    expected = [zero_toy.train(plain, step) for step in range(len(losses))]
    assert losses == pytest.approx(expected, rel=1e-6)


def first_shard(folder: Path, step: int = 4) -> Path:
    return folder / f"global_step{step}" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a shard is missing": lambda folder: first_shard(folder).unlink(),
    "cannot be read": lambda folder: os.truncate(first_shard(folder), 1000),
    r"of steps \[3.0, 4.0\]": lambda folder: shutil.copy(
        first_shard(folder, 3), first_shard(folder)
    ),
}


@pytest.mark.process
@pytest.mark.timeout(600)
@after_runs()
def test_zero_engine_in_another_number_of_processes_refuses_damaged_shards(
    shards, lone_group, tmp_path
):
    engine = zero_toy.engine(3)
    engine.load(shards, 4)
    for index, (text, damage) in enumerate(DAMAGES.items()):
        damaged = tmp_path / str(index)
        shutil.copytree(shards, damaged)
        damage(damaged)
        with pytest.raises(CheckpointError, match=text):
            engine.load(damaged, 4)
    engine.close()
