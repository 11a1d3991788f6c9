"""Two processes: one that hangs, and codebooks that stay equal. The rest: tests/e2e/test_trainers.py."""

from __future__ import annotations

import json
import math
import signal
import socket
import sys
import time

import pytest
import torch
import warm_python
from lavis_runs import torchrun


@pytest.mark.process
def test_a_process_that_hangs_ends_the_other_after_the_time_given(yaml, start, losses, tmp_path):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])
    arguments = yaml("stage1", "run.iters_per_epoch=100000", "run.timeout_minutes=0.05", "run.save_seconds=0",
                     "run.num_workers=0", "run.tensorboard=False", name="hang")
    # The second is no child of the warm interpreter, so that the signal stops the process itself.
    both = [start(python, "train.py", *arguments, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            for rank, python in enumerate((warm_python.PYTHON, sys.executable))]
    log = tmp_path / "hang" / "stage1.log.jsonl"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and both[0].poll() is None and not log.is_file():
            time.sleep(0.05)
        both[1].send_signal(signal.SIGSTOP)
        out, error = both[0].communicate(timeout=60)
    finally:
        both[1].kill()
        both[1].communicate()
    assert both[0].returncode in (1, 2), out + error
    assert "did not answer" in error or "has taken more than 0.05 minutes" in error, error
    assert "the same command resumes from there" in error and "Traceback" not in error


@pytest.mark.process
def test_codebooks_stay_equal(yaml, start, tmp_path):
    _, (first, second) = torchrun(start, tmp_path, yaml(
        "stage2", "model.load_pretrained=False", "model.codebook_warmup=2", "model.restart_every=2", "run.max_epoch=1",
        "run.iters_per_epoch=6", "run.num_workers=0"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    lines = [json.loads(line) for line in (tmp_path / "stage2" / "stage2.log.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all(math.isfinite(line["last_loss"]) for line in lines)
    assert "perplexity" not in lines[1] and all(0 < line["codebook_used"] <= 1 for line in lines[2:])
    assert lines[2]["loss_embed"] < lines[1]["last_loss"]
