"""`benchmarks/seedx.py` on the tiny SEED-X: one JSON line whose figures belong together, or one sentence."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import warm_python

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([warm_python.PYTHON, str(ROOT / "benchmarks" / "seedx.py"), "--device", "cpu", *arguments],
                          capture_output=True, text=True, env=environment, timeout=170, check=False)


@pytest.mark.process
def test_one_line_says_what_where_and_how_fast(tiny_x_folder: Path) -> None:
    done = run("--model", str(tiny_x_folder), "--repeats", "1", "--new", "7", "--picture", "40x30", "--steps", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    line = json.loads(done.stdout)
    results = line["results"]
    assert 0 < results["tokens"] <= 7
    assert results["tokens_per_second"] * results["answer_seconds"] == pytest.approx(results["tokens"], rel=0.01)
    assert all(results[f"{name}_seconds"] > 0 for name in ("draw", "edit", "reconstruct", "read_picture"))
    assert results["memory"]["peak_gib"] > 0 and "vision tower" in results["memory"]["planned_gib"]
    assert line["gpu"] == "not measured on GPU" and line["runtime"] == "cpu in float32"
    assert line["hardware"]["cores"] and line["versions"]["diffusers"] and line["date"]
    assert "seedx.py" in line["command"]


@pytest.mark.process
def test_weights_that_are_not_there_are_a_sentence() -> None:
    done = run("--model", "/nowhere/seed-x")
    assert done.returncode == 2 and done.stderr.startswith("seedx: ") and done.stderr.count("\n") == 1
    assert "/nowhere/seed-x" in done.stderr
