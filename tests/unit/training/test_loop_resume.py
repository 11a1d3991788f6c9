"""Runs that are killed, stopped or run out of disk space: their files, and that resuming is bitwise
equal.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import loop_toy as toy
import pytest
from full_disk import file_size_limit

from seed_multimodal.errors import SeedError

Start = Callable[..., subprocess.Popen]
LONG = {"max_steps": 40, "gradient_accumulation_steps": 2, "logging_steps": 1, "save_steps": 3}


@pytest.mark.process
@pytest.mark.timeout(600)
def test_resume_after_sigkill_is_bitwise_equal(start_toy: Start, tmp_path):
    """With accumulation and EMA in fp32 and bf16, killed at a random micro-step."""
    processes = {
        p: start_toy(tmp_path / p, {**LONG, "precision": p, "pause": 0.1}) for p in ("fp32", "bf16")
    }
    running = {precision: random.SystemRandom().randint(2, 30) for precision in processes}
    deadline = time.monotonic() + 300
    while running and time.monotonic() < deadline:
        for precision in [
            p for p, at in running.items() if len(toy.read_losses(tmp_path / p)) >= at
        ]:
            processes[precision].send_signal(signal.SIGKILL)
            del running[precision]
        time.sleep(0.005)
    for precision, process in processes.items():
        assert process.wait(timeout=30) == -signal.SIGKILL, process.stdout.read()
        assert not (tmp_path / precision / "toy.done.json").exists()
        killed_at = len(toy.read_losses(tmp_path / precision))
        uninterrupted = toy.train(tmp_path / f"{precision}-whole", **LONG, precision=precision)
        resumed = toy.train(tmp_path / precision, **LONG, precision=precision)
        assert toy.read_losses(tmp_path / precision) == toy.read_losses(
            tmp_path / f"{precision}-whole"
        ), killed_at
        assert resumed["sum"] == uninterrupted["sum"]
        first, second = (
            [
                json.loads(line)
                for line in (tmp_path / run / "toy.log.jsonl").read_text().splitlines()
            ]
            for run in (precision, f"{precision}-whole")
        )
        assert [line["step"] for line in first] == list(range(1, 41))
        assert [line["loss"] for line in first] == [line["loss"] for line in second]


def test_sigterm_finishes_the_step_and_saves(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        toy.train(tmp_path / "stopped", stop_at=6)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert (
        "[toy] stopped by SIGTERM after step 7 of 12; the same command resumes from"
        in capsys.readouterr().out
    )
    assert len(toy.read_losses(tmp_path / "stopped")) == 7
    uninterrupted = toy.train(tmp_path / "whole")
    resumed = toy.train(tmp_path / "stopped")
    assert (
        len((tmp_path / "stopped" / "losses.0.txt").read_text().splitlines()) == 12
    )  # no step is repeated
    assert toy.read_losses(tmp_path / "stopped") == toy.read_losses(tmp_path / "whole")
    assert resumed["sum"] == uninterrupted["sum"]


def test_sigterm_at_the_last_step_leaves_the_stage_unfinished(tmp_path):
    with pytest.raises(SystemExit):
        toy.train(tmp_path, stop_at=11)
    assert not (tmp_path / "toy.done.json").exists()
    assert toy.train(tmp_path)["steps"] == 12 and len(toy.read_losses(tmp_path)) == 12


@pytest.mark.parametrize(("limit", "remaining"), [(None, [8, 6, 3]), (2, [8, 6])])
def test_checkpoints_by_time_are_replaced_by_the_next(tmp_path, limit, remaining):
    """Next to `save_steps`; a run that is resumed does so, too."""
    settings = {"save_steps": 3, "save_seconds": 1e-9, "save_total_limit": limit}
    with pytest.raises(SystemExit):
        toy.train(tmp_path, **settings, stop_at=4)
    checkpoints = tmp_path / "toy.checkpoints"
    assert sorted(path.name for path in checkpoints.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-5",
    ]
    toy.train(tmp_path, **settings, max_steps=8)
    assert [step for step, _ in toy.checkpoints(checkpoints)] == remaining


@pytest.mark.process
@pytest.mark.timeout(400)
def test_full_disk_leaves_the_last_checkpoint(start_toy: Start, tmp_path):
    """A file system with space for one checkpoint, but not for a second one next to it."""
    unshare = shutil.which("unshare")
    mount = f"mount -t tmpfs -o size=40k none {tmp_path}"
    if (
        unshare is None
        or subprocess.run([unshare, "-Urm", "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("this system allows no user mounts")
    script = f'{mount} && exec "$@"'
    process = start_toy(
        tmp_path,
        {"save_steps": 1, "logging_steps": 100},
        before=(unshare, "-Urm", "sh", "-c", script, "sh", sys.executable),
    )
    output = process.communicate(timeout=350)[0]
    assert process.returncode == 2, output
    assert re.search(
        r"The checkpoint of step 2 cannot be written: .* \(0 MiB of the disk are free\); "
        r"the last checkpoint \(.*toy.checkpoints/checkpoint-1\) is intact",
        output,
    ), output
    assert "files: ['losses.0.txt', 'toy.checkpoints']" in output and "state of step: 1" in output


def test_file_size_limit_while_writing_checkpoint_and_log(tmp_path):
    """RLIMIT_FSIZE at several sizes: an error that names the file.

    The last checkpoint is intact.
    """

    def limited(folder: Path, size: int, **settings: object) -> str:
        with file_size_limit(size), pytest.raises(SeedError) as caught:
            toy.train(folder, **settings)
        return str(caught.value)

    error = limited(tmp_path / "none", 1500, save_steps=1)
    assert re.fullmatch(
        r"The checkpoint of step 1 cannot be written: .*; nothing was saved yet\.", error
    )
    assert sorted(p.name for p in (tmp_path / "none").iterdir()) == [
        "losses.0.txt",
        "toy.checkpoints",
    ]
    assert not [
        p for p in (tmp_path / "none" / "toy.checkpoints").iterdir() if p.name != ".run.lock"
    ]

    with pytest.raises(SystemExit):
        toy.train(tmp_path / "some", stop_at=6)
    content = toy.content(tmp_path / "some")
    error = limited(tmp_path / "some", len(content["optimizer.pt"]) - 1000, save_steps=1)
    assert re.search(r"of step 8 cannot be written: .*checkpoint-7\) is intact\.", error)
    assert toy.content(tmp_path / "some") == content

    log = tmp_path / "log"
    error = limited(log, 6000, logging_steps=1, max_steps=100)
    assert "toy.log.jsonl: cannot be written (the disk or quota is full (File too large))" in error
    assert (log / "toy.log.jsonl").stat().st_size == 6000 and not (log / "toy.done.json").exists()
    assert toy.saved(tmp_path / "some")["global_step"] == 7
