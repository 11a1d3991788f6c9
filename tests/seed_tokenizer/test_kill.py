"""A run that is really killed goes on where it stopped, with the same losses to the last bit.

Stage 2, because most happens there: k-means start, counts of codes, restarts of dead ones, a data worker.
"""

from __future__ import annotations

import signal
import sys
import time

import torch

OPTIONS = ("model.load_pretrained=False", "model.restart_every=3", "run.iters_per_epoch=13", "run.max_epoch=2",
           "run.save_every_steps=4", "run.num_workers=1", "run.batch_size_train=4")


def test_sigkill_and_resume_gives_bit_equal_losses(yaml, run, start, losses, tmp_path):
    process = start(sys.executable, "train.py", *yaml("stage2", *OPTIONS, name="killed"))
    log = tmp_path / "killed" / "stage2.log.jsonl"
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and log.read_text().count("\n") >= 6:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, error = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, error
    made = len(losses(tmp_path / "killed", "stage2"))
    assert 6 <= made < 26 and not (tmp_path / "killed" / "stage2.done.json").exists()

    run(yaml("stage2", *OPTIONS, name="killed"))
    run(yaml("stage2", *OPTIONS, name="whole"))
    killed, whole = (losses(tmp_path / name, "stage2") for name in ("killed", "whole"))
    assert list(killed) == list(whole) == list(range(1, 27)) and killed == whole
    first, second = (torch.load(tmp_path / name / "checkpoint_1.pth", weights_only=True)["model"]
                     for name in ("killed", "whole"))
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
