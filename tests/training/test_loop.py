"""The training loop: sample order, schedule, and a run that is really killed and goes on with the same losses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from seed_multimodal.errors import CheckpointError
from seed_multimodal.training.loop import StageSettings, batch_indices, learning_rate, run_stage

RUN = """
import sys, time, torch
from pathlib import Path
from torch import nn
from seed_multimodal.training.loop import StageSettings, batch_indices, run_stage
folder, pause = Path(sys.argv[1]), float(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
data = torch.randn(64, 8)
settings = StageSettings(steps=40, batch_size=8, lr=1e-2, warmup=5, ema=0.9, precision="fp32", log_every=1,
                         save_seconds=0)
def loss(step):
    time.sleep(pause)
    x = data[batch_indices(step, 8, 64, 0)] + 0.01 * torch.randn(8, 8)
    value = (model(x) - x.sum(1, keepdim=True)).square().mean()
    with open(folder / "losses.txt", "a") as file:
        file.write(f"{step} {value.item().hex()}\\n")
    return value, {}
def finish():
    return {"sum": sum(p.double().sum().item() for p in model.parameters()).hex()}
run_stage("toy", model, loss, settings, folder, finish)
"""


def _start(script: Path, folder: Path, pause: float) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    source = Path(__file__).resolve().parents[2] / "src"
    return subprocess.Popen([sys.executable, str(script), str(folder), str(pause)],
                            env={**os.environ, "PYTHONPATH": str(source)}, stdout=subprocess.DEVNULL)


def _losses(folder: Path) -> dict[int, str]:
    """Last loss written for each step (a killed step is computed again after the resume)."""
    lines = (folder / "losses.txt").read_text().split("\n")
    return {int(line.split()[0]): line.split()[1] for line in lines if len(line.split()) == 2}


def test_sigkill_and_resume_gives_bit_equal_losses(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    assert _start(script, tmp_path / "whole", 0).wait(timeout=120) == 0
    killed = _start(script, tmp_path / "killed", 0.05)
    losses = tmp_path / "killed" / "losses.txt"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (losses.is_file() and len(losses.read_text().splitlines()) >= 15):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(timeout=30) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "toy.done.json").exists()
    assert _start(script, tmp_path / "killed", 0).wait(timeout=120) == 0
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")
    records = [json.loads((tmp_path / name / "toy.done.json").read_text()) for name in ("whole", "killed")]
    assert records[0]["sum"] == records[1]["sum"]


def test_batches_walk_every_sample_once_an_epoch() -> None:
    seen = torch.cat([batch_indices(step, 8, 30, seed=3) for step in range(15)])
    for epoch in range(4):
        assert sorted(seen[epoch * 30:(epoch + 1) * 30].tolist()) == list(range(30))
    assert not torch.equal(seen[:30], seen[30:60])


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (9, 1.0), (10, 1.0), (60, 0.51), (110, 0.02)])
def test_learning_rate(step: int, expected: float) -> None:
    settings = StageSettings(steps=110, lr=1.0, warmup=10, min_lr_ratio=0.02)
    assert learning_rate(step, settings) == pytest.approx(expected)


def test_warm_start_takes_the_averaged_weights_and_refuses_another_model(tmp_path: Path) -> None:
    def run(name: str, model: torch.nn.Module, **more: object) -> dict:
        settings = StageSettings(steps=3, batch_size=2, warmup=1, precision="fp32", ema=0.5, **more)
        x = torch.ones(2, 3)
        return run_stage(name, model, lambda step: ((model(x) ** 2).mean(), {}), settings, tmp_path / name, dict)

    first = torch.nn.Linear(3, 2)
    run("first", first)
    second = torch.nn.Linear(3, 2)
    run("second", second, start=str(tmp_path / "first" / "first.state.pt"), lr=0.0)
    torch.testing.assert_close(second.weight, first.weight)
    with pytest.raises(CheckpointError, match="another size"):
        run("third", torch.nn.Linear(3, 4), start=str(tmp_path / "first" / "first.state.pt"))
    with pytest.raises(CheckpointError, match="no such state"):
        run("fourth", torch.nn.Linear(3, 2), start=str(tmp_path / "none.pt"))
