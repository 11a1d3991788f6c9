"""SIGTERM with steps, evaluations and checkpoints that take longer than torchrun's 30 seconds."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import loop_toy as toy
import pytest
import warm_python
from real_processes import STARTED, nothing_stays_behind, processes_with, wait_until  # noqa: F401

from seed_multimodal.training.checkpoint import checkpoints

Start = Callable[..., subprocess.Popen]
LAUNCHER = [
    warm_python.PYTHON,
    *"-m seed_multimodal.training.torchrun --standalone --nproc-per-node 1".split(),
]


def start_under_torchrun(start_toy: Start, folder: Path, pause: float) -> subprocess.Popen:
    """One process under our launcher, in its first step of `pause` seconds."""
    process = start_toy(folder, {"pause": pause}, before=LAUNCHER)
    STARTED.append(process)
    wait_until((folder / "begun.0").exists, process)
    return process


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(400)
def test_sigterm_under_torchrun_waits_for_a_long_step(start_toy: Start, tmp_path):
    process = start_under_torchrun(start_toy, tmp_path, pause=40)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # Slurm and a shell may both pass it on
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 143, output
    assert "stopped by SIGTERM after step 1 of 12" in output
    assert [step for step, _ in checkpoints(tmp_path / "toy.checkpoints")] == [1]


@pytest.mark.process
@pytest.mark.timeout(400)
def test_exit_code_after_sigterm_without_a_checkpoint(start_toy: Start, tmp_path):
    """143 means that the step was saved."""
    process = start_under_torchrun(start_toy, tmp_path, pause=8)
    process.send_signal(signal.SIGTERM)
    for pid in processes_with(str(tmp_path)):
        os.kill(pid, signal.SIGKILL)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 128 + signal.SIGKILL, output
    assert not checkpoints(tmp_path / "toy.checkpoints")


def test_sigterm_during_an_evaluation_starts_no_further_step(tmp_path):
    def evaluate(step: int) -> dict[str, float]:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"eval_loss": 1.0}

    with pytest.raises(SystemExit) as stopped:
        toy.train(tmp_path, evaluate=evaluate)
    assert stopped.value.code == 143
    assert len(toy.read_losses(tmp_path)) == 3 and toy.saved(tmp_path)["global_step"] == 3
    toy.train(tmp_path, evaluate=evaluate)
    assert len(toy.read_losses(tmp_path)) == 12
