"""Runs that are killed or stopped: their files, and that resuming is bitwise equal."""

import os
import random
import signal
import subprocess

import loop_toy as toy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_processes import STARTED, kill_when, nothing_stays_behind, processes_with, wait_until  # noqa: F401
from warm_processes import PYTHON

LONG = {
    "max_steps": 40,
    "precision": "bf16",
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "save_steps": 3,
}
LAUNCHER = [
    PYTHON,
    *"-m seed_multimodal.training.torchrun --standalone --nproc-per-node 1".split(),
]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(600)
def test_resume_after_sigkill_is_bitwise_equal(tmp_path):
    # With accumulation and EMA in bf16, killed at a random micro-step.
    micro_step = random.SystemRandom().randint(2, 30)
    process = toy.start(tmp_path / "killed", {**LONG, "pause": 0.05})
    kill_when(lambda: len(toy.read_losses(tmp_path / "killed")) >= micro_step, process)
    assert not (tmp_path / "killed" / "toy.done.json").exists()
    uninterrupted = toy.train(tmp_path / "whole", **LONG)
    resumed = toy.train(tmp_path / "killed", **LONG)
    assert toy.read_losses(tmp_path / "killed") == toy.read_losses(tmp_path / "whole"), micro_step
    assert resumed["sum"] == uninterrupted["sum"]
    first, second = (toy.log_lines(tmp_path / name) for name in ("killed", "whole"))
    assert [line["step"] for line in first] == list(range(1, 41))
    assert [line["loss"] for line in first] == [line["loss"] for line in second]


@pytest.mark.slow
@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    stop_at=st.integers(0, 11),
    accumulation=st.sampled_from([1, 2, 3]),
    ema=st.sampled_from([0.0, 0.9]),
    save_steps=st.integers(1, 5),
    limit=st.sampled_from([None, 1, 2]),
)
def test_resume_after_sigterm_is_bitwise_equal(
    tmp_path_factory, stop_at, accumulation, ema, save_steps, limit
):
    # The step in progress is finished and saved, so that none is repeated.
    folder = tmp_path_factory.mktemp("sigterm")
    options = {
        "max_steps": 6,
        "gradient_accumulation_steps": accumulation,
        "ema": ema,
        "save_steps": save_steps,
        "save_total_limit": limit,
    }
    stop_at %= 6 * accumulation
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        toy.train(folder / "stopped", stop_at=stop_at, **options)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (folder / "stopped" / "toy.done.json").exists()
    done = stop_at // accumulation + 1
    assert len(toy.read_losses(folder / "stopped")) == done * accumulation
    assert toy.saved(folder / "stopped")["global_step"] == done
    expected = toy.train(folder / "whole", **options)["sum"]
    assert toy.train(folder / "stopped", **options)["sum"] == expected
    assert toy.read_losses(folder / "stopped") == toy.read_losses(folder / "whole")
    assert len((folder / "stopped" / "losses.0.txt").read_text().splitlines()) == 6 * accumulation

    # The last one, and before it the newest scheduled ones; the interim one of the stop is gone.
    scheduled = [step for step in range(5, 0, -1) if step % save_steps == 0]
    kept = [6, *scheduled][:limit]
    assert toy.steps(folder / "stopped") == kept


@pytest.mark.parametrize(
    "signals, ends",
    [
        ([signal.SIGTERM], SystemExit),
        ([signal.SIGINT], SystemExit),
        ([signal.SIGINT, signal.SIGINT], KeyboardInterrupt),
    ],
)
def test_signal_during_an_evaluation_starts_no_further_step(tmp_path, signals, ends):
    # An evaluation may take minutes; the cluster waits for seconds, and a user at the second Ctrl-C
    # not at all.
    def evaluate(step):
        for number in signals if step == 3 else ():
            os.kill(os.getpid(), number)
        return {"eval_loss": 1.0}

    with pytest.raises(ends) as stopped:
        toy.train(tmp_path, evaluate=evaluate)
    if ends is SystemExit:
        assert stopped.value.code == 143
        assert toy.saved(tmp_path)["global_step"] == 3
    assert len(toy.read_losses(tmp_path)) == 3


def test_signal_during_the_last_evaluation(tmp_path, capsys):
    # All steps are made, so the same command only evaluates, and the run is complete.
    evaluations = []

    def evaluate(step):
        evaluations.append(step)
        if len(evaluations) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            return {}
        return {"eval_loss": 1.0}

    with pytest.raises(SystemExit):
        toy.train(tmp_path, evaluate=evaluate, max_steps=4)
    assert "after the last step (4), before the end of the run" in capsys.readouterr().out
    assert toy.train(tmp_path, evaluate=evaluate, max_steps=4)["steps"] == 4
    assert evaluations == [1, 2, 3, 4, 4] and toy.log_lines(tmp_path)[-1]["eval_loss"] == 1


def start_under_torchrun(folder, pause: float) -> subprocess.Popen:
    """One process under our launcher, in its first step of `pause` seconds."""
    process = toy.start(folder, {"pause": pause}, before=LAUNCHER)
    STARTED.append(process)
    wait_until((folder / "begun.0").exists, process)
    return process


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.timeout(400)
def test_sigterm_under_torchrun_waits_for_a_long_step(tmp_path):
    # torchrun alone kills a process after 30 seconds.
    process = start_under_torchrun(tmp_path, pause=40)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # Slurm and a shell may both pass it on
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 143, output
    assert toy.steps(tmp_path) == [1]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(400)
def test_exit_code_after_sigterm_without_a_checkpoint(tmp_path):
    # 143 means that the step was saved.
    process = start_under_torchrun(tmp_path, pause=8)
    process.send_signal(signal.SIGTERM)
    for pid in processes_with(str(tmp_path)):
        os.kill(pid, signal.SIGKILL)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 128 + signal.SIGKILL, output
    assert not toy.steps(tmp_path)
