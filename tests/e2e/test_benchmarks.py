"""Every program of `benchmarks/` at its smallest: the lines it prints, and figures that belong
together."""

from __future__ import annotations

import importlib
import json
import runpy
import sys

import pytest
import torch
from repository import ROOT

BENCHMARKS = ROOT / "benchmarks"
PROGRAMS = {  # flags; what is timed, and in which units
    "tokenizer": (
        "--batches 1 3 --variants plain packed".split(),
        {"tokenizer encode": "images", "tokenizer clients": "images"},
    ),
    "generation": (
        "--batches 2 --prompt 8 --new 4 --variants plain engine".split(),
        {"generation": "tokens"},
    ),
    "drawing": (
        "--batches 2 --steps 1 --variants plain batch clients fast".split(),
        {"draw": "images", "edit": "images", "reconstruct": "images"},
    ),
    "training": (
        ["--batches", "2"],
        {"training llm": "useful_tokens", "training tokenizer": "images"},
    ),
    "serving": ("--requests 2 --clients 1 2".split(), {"serving": "requests"}),
}


def printed_lines(
    program: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> list[dict]:
    """What a program prints when it is run in this process."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    command = [f"{program}.py", "--device", "cpu", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(sys, "orig_argv", ["python", *command])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / f"{program}.py"), run_name="__main__")
    assert ended.value.code == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_benchmark_prints_a_line_per_variant(program, monkeypatch, capsys):
    arguments, units = PROGRAMS[program]
    repeats = [] if program == "serving" else ["--repeats", "1"]
    lines = printed_lines(program, [*arguments, *repeats], monkeypatch, capsys)
    assert {line["benchmark"] for line in lines} == set(units)
    for line in lines:
        results = line["results"]
        rate = line["results"][f"{units[line['benchmark']]}_per_second"]
        assert "error" not in results and rate > 0 and results["times_plain"] > 0
        assert line["variant"] != "plain" or results["times_plain"] == 1.0
        assert line["hardware"]["cores"] and line["versions"]["torch"] and line["date"]
        assert f"{program}.py --device cpu" in line["command"]
        if line["benchmark"] == "tokenizer encode":
            assert rate * results["seconds"] == pytest.approx(line["batch"], rel=0.01)
            assert results["codes_equal_float32"] == results["images_equal_float32"] == 1.0
        if program == "training":
            assert results["loss"] < results["first_loss"], (
                "the same batch again and again is learned"
            )


def test_memory_of_published_sizes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py", "--models", "0.6B", "8B"])
    runpy.run_path(str(BENCHMARKS / "memory.py"), run_name="__main__")
    small, large = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    # As published, with rows for 159,863 instead of 151,936 tokens; the small one's tables are one.
    assert small["parameters"] == 596_049_920 + (159_863 - 151_936) * 1024
    assert large["parameters"] == 8_190_735_360 + (159_863 - 151_936) * 2 * 4096
    assert large["bf16"] > large["int8"] > large["4bit"] > large["lora"]
    assert large["kv_row"] == round(2 * 36 * 8 * 128 * 4096 * 2 / 1e9, 2)


@pytest.mark.process
def test_rehearsal_measures_a_command(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rehearsal = importlib.import_module("rehearsal")
    layouts = importlib.import_module("original_layouts")

    # 1. A sparse file in torch's format.
    file = tmp_path / "weights.bin"
    shapes = {"a": torch.empty(40, 1_000_000, device="meta"), "norm.weight": torch.empty(4)}
    layouts.write_weights(file, shapes, torch.float32, sparse=True)
    weights = torch.load(file, weights_only=True)
    assert file.stat().st_size > 160e6 > 10 * 512 * file.stat().st_blocks
    assert 0.019 < weights["a"][0].std() < 0.021 and weights["norm.weight"].eq(1).all()

    # 2. A child's memory, of which the mapped file is not anonymous; then too little of it.
    code = (
        "import mmap, time; file = open('weights.bin', 'rb'); heap = bytearray(10**8); "
        "mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); sum(mapped[::4096]); "
        "time.sleep(0.5)"
    )
    row = rehearsal.Row("8b", f'{sys.executable} -c "{code}"')
    results = rehearsal.measure(row, tmp_path)
    assert results["fits"] and results["exit_code"] == 0
    assert 0.1 <= results["anonymous_gb"] < 0.12
    assert 0.26 < results["resident_gb"] < 0.3
    monkeypatch.setattr(rehearsal, "RESERVE", 10**15)
    assert not rehearsal.measure(row, tmp_path)["fits"]
