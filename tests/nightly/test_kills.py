"""Each trainer, killed in its steps and its checkpoints: the result is that of an unbroken run."""

import contextlib
import os
import random
import signal
import time

import pytest
from real_processes import wait_until
from tensors import equal
from trainers import TRAINERS

pytestmark = [pytest.mark.nightly, pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 16
SAVE_STEPS = 2
KILLS = 3


def kill(trainer, process, output, number):
    """Kill a run at a random time after further steps; each second one while it writes a
    checkpoint. Most of a run's seconds are imports: by the clock, kills would only hit these."""
    step = 4 * number + 3
    wait_until(lambda: max(trainer.losses(output), default=0) >= step, process)
    if number % 2:
        wait_until(lambda: any(output.rglob("*.tmp")), process, seconds=20)
    else:
        time.sleep(random.Random(f"{trainer.name} {number}").uniform(0, 0.1))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    printed = process.communicate()
    assert process.returncode == -signal.SIGKILL, printed


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.name)
def test_killed_training_ends_as_an_unbroken_one(trainer, tmp_path):
    # Lost or doubled batches, half-written checkpoints and forgotten random states end here.
    parts = tmp_path / "parts"
    parts.mkdir()
    trainer.parts(parts)
    unbroken = tmp_path / "unbroken"
    killed = tmp_path / "killed"
    trainer.run(parts, trainer.arguments(parts, unbroken, STEPS, SAVE_STEPS, []))
    arguments = trainer.arguments(parts, killed, STEPS, SAVE_STEPS, [])
    for number in range(KILLS):
        kill(trainer, trainer.start(parts, arguments), killed, number)
    assert "resumes from" in trainer.run(parts, arguments)
    assert trainer.losses(killed) == trainer.losses(unbroken)
    assert equal(trainer.result(killed), trainer.result(unbroken))
