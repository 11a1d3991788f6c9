"""Training engines: independence of accelerate's variables, unequal forward passes, buffers under
DeepSpeed.
"""

from __future__ import annotations

import os
from dataclasses import replace

import loop_toy as toy
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scaled_toy import SETTINGS, Scaled, task_of, unequal_passes

from seed_multimodal.errors import ConfigError
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.engine import ZeroEngine, resolve_deepspeed_config
from seed_multimodal.training.optimizers import MuonWithAdamW


@pytest.mark.parametrize(
    ("variable", "value"),
    [("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"), ("ACCELERATE_MIXED_PRECISION", "bf16")],
)
def test_accelerates_variables_change_no_gradient(tmp_path, monkeypatch, variable, value):
    expected = toy.train(tmp_path / "plain", logging_steps=1)
    monkeypatch.setenv(variable, value)
    record = toy.train(tmp_path / "variable", logging_steps=1)
    assert record["sum"] == expected["sum"]
    assert toy.read_losses(tmp_path / "variable") == toy.read_losses(tmp_path / "plain")


@pytest.mark.process
@pytest.mark.timeout(200)
def test_processes_with_unequal_numbers_of_forward_passes(tmp_path):
    """A pixel decoder's micro-step has one pass for each image size in it."""
    mp.spawn(unequal_passes, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = Scaled()
    x = torch.arange(8.0).view(2, 4)
    (alone(x) + alone(x) + alone(2 * x)).div(2).backward()  # of both processes, averaged
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone.layer.weight.grad)


@pytest.fixture(scope="module")
def lone_group():
    """torch.distributed's group of this process; one for all tests, since DeepSpeed keeps it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ProcessGroup()
    dist.destroy_process_group()


@pytest.mark.process
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_engine_keeps_floating_buffers(lone_group: ProcessGroup, stage):
    """Such as the rotary embeddings' frequencies, which DeepSpeed before 0.19.2 casts to bf16."""
    pytest.importorskip("deepspeed")
    module = Scaled()
    expected = module.frequencies.clone()
    linear = torch.nn.functional.linear
    settings = replace(SETTINGS, precision="bf16")
    config, _ = resolve_deepspeed_config(
        {"zero_optimization": {"stage": stage}}, settings, world=1, rows=2, hidden_size=4
    )
    module.layer.bias.data = module.layer.bias.data.half()  # weights may be as in their files
    engine = ZeroEngine(task_of(module), settings, lone_group, torch.device("cpu"), config)
    try:
        assert module.layer.weight.dtype == torch.bfloat16
        assert module.frequencies.dtype == torch.float32 and torch.equal(
            module.frequencies, expected
        )
    finally:
        engine.close()
    assert torch.nn.functional.linear is linear  # ZeRO-3's does not take quantised weights
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(
        os.environ
    )  # another program could not start alone


def test_zero_engine_refuses_muon(lone_group: ProcessGroup):
    """It updates whole matrices, which ZeRO cuts into flat pieces."""
    task = task_of(Scaled())
    task.optimizer = MuonWithAdamW(task.module, 1e-3, 0.0)
    config = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ConfigError, match="muon is not supported with DeepSpeed"):
        ZeroEngine(task, SETTINGS, lone_group, torch.device("cpu"), config)
