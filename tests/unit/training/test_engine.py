"""What DeepSpeed leaves behind (unequal numbers of forward passes: e2e/test_trainers.py)."""

import os
from collections.abc import Iterator

import loop_toy as toy
import pytest
import torch
import torch.distributed as dist
from torch import nn

from seed_multimodal.errors import ConfigError
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
