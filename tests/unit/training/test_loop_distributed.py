"""Two processes under torchrun equal one with twice the batch, write one checkpoint and log, and
stop together.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import loop_toy as toy
import pytest
import torch
import warm_python

from seed_multimodal.errors import CheckpointError
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.metrics import merge

TWO = f"{warm_python.PYTHON} -m torch.distributed.run --standalone --nproc-per-node 2".split()
EQUAL = {
    "name": "equal",
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "noise": 0,
    "logging_steps": 1,
}
ENDLESS = {
    "name": "endless",
    "batch_size": 4,
    "max_steps": 100_000,
    "pause": 0.02,
    "logging_steps": 100_000,
}


@pytest.mark.process
@pytest.mark.timeout(900)
def test_two_processes_equal_one_with_the_double_batch_and_stop_together(
    start_toy: Callable[..., subprocess.Popen], tmp_path
):
    folder = tmp_path / "two"
    process = start_toy(folder, EQUAL, ENDLESS, before=TWO)
    toy.train(tmp_path / "one", **{**EQUAL, "batch_size": 8})
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None and lines(folder) < 24 + 5:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # to torchrun, which passes it on to both
    output = process.communicate(timeout=200)[0]
    assert output.count("refused: [single] this stage supports a single process, not 2") == 2, (
        output
    )
    compare_states(tmp_path, output)
    compare_losses(tmp_path)
    compare_logs(tmp_path)
    assert_stopped_together(folder, output)
    assert_another_batch_fails(folder)


def lines(folder: Path, rank: int = 0) -> int:
    """Micro-steps of this process in both stages."""
    file = folder / f"losses.{rank}.txt"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def compare_states(folder: Path, output: str) -> None:
    assert (folder / "two" / "equal.done.json").is_file(), output
    single, double = (toy.saved(folder / run, "equal") for run in ("one", "two"))
    for part in ("model", "ema"):
        torch.testing.assert_close(double[part], single[part], rtol=1e-5, atol=1e-6)
    assert (
        single["processes"],
        single["samples_per_step"],
        double["processes"],
        double["samples_per_step"],
    ) == (1, 16, 2, 16)
    record = json.loads((folder / "two" / "equal.done.json").read_text())
    assert (record["processes"], record["accumulate"], record["steps"]) == (2, 2, 12)


def compare_losses(folder: Path) -> None:
    """The mean of the processes' losses is the loss of the double batch."""
    single = toy.read_losses(folder / "one")
    # Lines of the second stage follow those of the first.
    texts = [
        (folder / "two" / f"losses.{rank}.txt").read_text().splitlines()[:24] for rank in (0, 1)
    ]
    first, second = ([float.fromhex(line.split()[1]) for line in text] for text in texts)
    assert first != second
    means = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert means == pytest.approx(list(single.values()), rel=1e-4)


def compare_logs(folder: Path) -> None:
    """One line per step, with numbers over both processes."""
    single, double = (
        [json.loads(line) for line in (folder / run / "equal.log.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    )
    assert [line["step"] for line in double] == list(range(1, 13))
    for a, b in zip(single, double, strict=True):
        assert [b[key] for key in ("loss", "half", "grad")] == pytest.approx(
            [a[key] for key in ("loss", "half", "grad")], rel=1e-4
        )
        assert b["samples_per_s"] * b["seconds_per_step"] == pytest.approx(16)


def assert_stopped_together(folder: Path, output: str) -> None:
    assert output.count("[endless] stopped by SIGTERM after step") == 1, output
    state = toy.saved(folder, "endless")
    steps = [lines(folder, rank) - 24 for rank in (0, 1)]
    assert steps == [state["global_step"]] * 2 and state["global_step"] >= 5
    assert not (folder / "endless.done.json").exists()
    assert not list(folder.glob(".*tmp"))


def assert_another_batch_fails(folder: Path) -> None:
    content = toy.content(folder, "endless")
    with pytest.raises(CheckpointError, match="saved with samples per step 8, this run has 4; use"):
        toy.train(folder, **ENDLESS)
    assert toy.content(folder, "endless") == content


def test_merge_of_log_lines():
    lines = [
        {"loss": 1.0, "bad": 2, "usage": 0.5, "wait_share": 0.1, "peak_memory_mib": 5.0},
        {
            "loss": 3.0,
            "bad": 1,
            "usage": 0.7,
            "wait_share": 0.3,
            "peak_memory_mib": 4.0,
            "only": 7.0,
        },
    ]
    merged = merge(lines)
    assert merged == pytest.approx(
        {
            "loss": 2.0,
            "bad": 3,
            "usage": 0.6,
            "wait_share": 0.3,
            "peak_memory_mib": 5.0,
            "only": 7.0,
        }
    )
    assert isinstance(merged["bad"], int)


def test_process_group_of_one_process():
    group = ProcessGroup()
    assert (group.world, group.rank, group.first) == (1, 0, True)
    assert group.agree(True, False) == [True, False] and group.gather({"a": 1}) == [{"a": 1}]
