"""The clocks, the facts about the machine, and every benchmark script at its smallest."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
import warm_python
from torch import nn

from seed_multimodal.evaluation import machine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("shared")


def test_measure_takes_the_median(timing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    lasts, clock = iter([8.0, 2.0, 16.0, 1.0]), [100.0]  # on a clock of its own: a real one measures the machine's load

    def work() -> None:
        clock[0] += next(lasts)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    taken = timing.measure(work, torch.device("cpu"), repeats=3, warmup=1)
    assert taken == {"seconds": 2.0, "fastest": 1.0, "slowest": 16.0}  # neither the mean nor the warm-up's 8


def test_measure_reads_a_running_clock(timing: ModuleType) -> None:
    assert timing.measure(lambda: time.sleep(0.02), torch.device("cpu"), repeats=1)["fastest"] > 0.015


def test_random_weights_replace_meta_tensors(timing: ModuleType) -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4))
    timing.fill_random(module, torch.device("cpu"), torch.float64)
    assert {str(t.device) for t in module.state_dict().values()} == {"cpu"}
    assert module[0].weight.dtype == torch.float64 and 0 < module[0].weight.abs().max() < 1
    assert torch.isfinite(module(torch.randn(3, 4, dtype=torch.float64))).all()


@pytest.mark.process
def test_lines_carry_references_only_where_they_were_measured(timing: ModuleType, monkeypatch, capsys) -> None:
    line = timing.print_line("x", torch.device("cpu"), {"model": "m"}, {"a": 1}, {"b": 2})
    assert "reference_h200" not in line and json.loads(capsys.readouterr().out) == line
    monkeypatch.setattr(machine, "hardware", lambda device: {"gpu": "NVIDIA H200"})
    assert timing.print_line("x", torch.device("cpu"), {}, {}, {"b": 2})["reference_h200"] == {"b": 2}


@pytest.mark.process
def test_machine_facts(tmp_path: Path) -> None:
    facts = machine.hardware()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["memory_gib"] > 0 and "gpu" not in facts
    assert machine.versions()["torch"] == torch.__version__.split("+")[0] or machine.versions()["torch"]
    assert machine.commit(tmp_path) == "unknown"


@pytest.mark.process
@pytest.mark.parametrize(("script", "arguments", "key"), [
    ("tokenizer.py", ["--batches", "1,2", "--repeats", "1"], "encode_images_per_second"),
    ("draw.py", ["--batches", "1", "--repeats", "1", "--steps", "1"], "decode_batch_1"),
    ("llm.py", ["--batches", "2", "--repeats", "1", "--prompt", "4", "--new", "4"], "tokens_per_second"),
])
def test_benchmark_scripts_print_one_json_line(script: str, arguments: list[str], key: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([warm_python.PYTHON, str(ROOT / "benchmarks" / script), "--device", "cpu", *arguments],
                          capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    line = json.loads(done.stdout)
    assert line["results"][key] and line["hardware"]["cores"] and line["parameters"] > 1e6
    assert line["command"].startswith("python ")
