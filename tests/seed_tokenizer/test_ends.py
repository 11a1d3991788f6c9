"""Runs that end before their time end at once, data workers included, and leave a state to go on from."""

from __future__ import annotations

import signal
import sys
import time

OPTIONS = ("run.num_workers=1", "run.iters_per_epoch=400", "run.max_epoch=1", "run.batch_size_train=4")


def test_a_loss_that_is_not_finite(yaml, start, tmp_path):
    process = start(sys.executable, "train.py", *yaml("stage1", *OPTIONS, "run.init_lr=1e30", "run.warmup_steps=0",
                                                      "run.warmup_lr=-1"))
    _, error = process.communicate(timeout=150)
    assert process.returncode == 2 and "Traceback" not in error
    assert error.startswith("train.py: The ") and error.count("\n") == 1 and "nothing was saved yet" in error


def test_sigterm_finishes_the_step_and_saves(yaml, start, tmp_path):
    process = start(sys.executable, "train.py", *yaml("stage1", *OPTIONS))
    log = tmp_path / "stage1" / "stage1.log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not log.is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert "the same command goes on from there" in out
    left = {file.name for file in (tmp_path / "stage1").iterdir()}
    assert "stage1.state.pt" in left and "stage1.done.json" not in left
