"""Each trainer, killed at random times: the result is that of an unbroken run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
from tensors import equal
from trainers import TRAINERS, Trainer

pytestmark = [pytest.mark.nightly, pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 16
SAVE_STEPS = 2
KILLS = 3


def wait_for_checkpoint(output: Path, seconds: float) -> None:
    """Return inside the writing of a checkpoint, or after some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(output.rglob("*.tmp")):
            return
        time.sleep(0.002)


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.name)
def test_killed_training_ends_as_an_unbroken_one(trainer: Trainer, tmp_path: Path):
    # Lost or doubled batches, half-written checkpoints and forgotten random states end here.
    parts = tmp_path / "parts"
    parts.mkdir()
    trainer.parts(parts)
    unbroken = tmp_path / "unbroken"
    killed = tmp_path / "killed"
    begin = time.monotonic()
    trainer.run(parts, trainer.arguments(parts, unbroken, STEPS, SAVE_STEPS, []))
    seconds = time.monotonic() - begin
    rng = random.Random(trainer.name)
    arguments = trainer.arguments(parts, killed, STEPS, SAVE_STEPS, [])
    for kill in range(KILLS):
        process = trainer.start(parts, arguments)
        time.sleep(seconds * rng.uniform(0.3, 0.8))
        if kill % 2:
            wait_for_checkpoint(killed, seconds / 2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    trainer.run(parts, arguments)
    assert trainer.losses(killed) == trainer.losses(unbroken)
    assert equal(trainer.result(killed), trainer.result(unbroken))
