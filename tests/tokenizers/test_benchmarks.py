"""The tokenizer's benchmark scripts at nano size: one JSON line per setting, with figures that belong together."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def lines(script: str, *arguments: str) -> list[dict]:
    done = run(script, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), "--device", "cpu", *arguments],
                          capture_output=True, text=True, env=environment, timeout=170, check=False)


def test_ladder_prints_a_line_per_lever_and_batch() -> None:
    printed = lines("tokenizer.py", "--ladder", "--batches", "1,3", "--repeats", "1", "--images", "8",
                    "--levers", "packed,graph", "--peak-tflops", "0.1")
    assert [(line["lever"], line["batch"]) for line in printed] == [
        ("plain", 1), ("plain", 3), ("packed", 1), ("packed", 3), ("graph", 1)]
    for line in printed[:4]:
        results = line["results"]
        assert results["share_equal_fp32"] == 1.0 and results["images_per_second"] > 0
        assert results["images_per_second"] * results["latency_ms"] == pytest.approx(1e3 * line["batch"], rel=0.02)
        flops = results["images_per_second"] * line["gflop_per_image"] / 1e3
        assert results["model_tflops"] == pytest.approx(flops, rel=0.02)
        assert results["mfu"] == pytest.approx(results["model_tflops"] / 0.1, rel=0.02)
        assert line["model"] == "pretrained/nano" and line["hardware"]["cores"] and line["versions"]["torch"]
    assert printed[0]["results"]["times_plain"] == 1.0
    assert "CUDA graphs need" in printed[4]["results"]["error"], "a lever that fails is a line, not the end"


def test_unknown_levers_are_named() -> None:
    done = run("tokenizer.py", "--levers", "pakced")
    assert done.returncode == 1 and "pakced" in done.stderr and not done.stdout


def test_a_batch_larger_than_the_set_is_a_full_one() -> None:
    program = "import tokenizer; print(tuple(tokenizer.pictures(900, 64, 'pretrained/nano').shape))"
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src")])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=170, check=False,
                          env={**os.environ, "PYTHONPATH": path})
    assert done.stdout.strip() == "(900, 3, 64, 64)", done.stderr[-2000:]


def test_flags_that_time_nothing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peak

    assert peak.batch_sizes("1,32") == [1, 32] and peak.peak("0.5") == "0.5" and peak.peak("measured") == "measured"
    for check, texts in ((peak.batch_sizes, ("0", "1,", "x", "-1", "")), (peak.positive, ("0", "1.5")),
                         (peak.peak, ("0", "nan", "inf", "-1", "fast"))):
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError):
                check(text)
    done = run("tokenizer_training.py", "--batches", "1,0")
    assert done.returncode == 2 and "'0' is not a whole number of at least 1" in done.stderr and not done.stdout


def test_training_prints_throughput_and_memory() -> None:
    printed = lines("tokenizer_training.py", "--batches", "4", "--repeats", "1", "--dtype", "fp32",
                    "--peak-tflops", "0.1")
    assert [line["encoder"] for line in printed] == ["modules", "packed"]
    for line in printed:
        results = line["results"]
        assert results["images_per_second"] * results["seconds_per_step"] == pytest.approx(4, rel=0.01)
        assert 0 < results["mfu"] < 10 and results["peak_memory_gib"] > 0.05
        assert results["loss"] < results["first_loss"], "the same batch again and again is learned"
