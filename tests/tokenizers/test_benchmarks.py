"""The tokenizer's benchmark scripts at nano size: one JSON line per setting, with figures that belong together."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_python

ROOT = Path(__file__).resolve().parents[2]


def lines(script: str, *arguments: str) -> list[dict]:
    done = run(script, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([warm_python.PYTHON, str(ROOT / "benchmarks" / script), "--device", "cpu", *arguments],
                          capture_output=True, text=True, env=environment, timeout=170, check=False)


@pytest.mark.process
def test_ladder_prints_a_line_per_lever_and_batch() -> None:
    printed = lines("tokenizer.py", "--ladder", "--batches", "1,3", "--repeats", "1", "--images", "8",
                    "--levers", "packed,graph", "--peak-tflops", "0.1")
    assert [(line["lever"], line["batch"]) for line in printed] == [
        ("plain", 1), ("plain", 3), ("packed", 1), ("packed", 3), ("graph", 1)]
    for line in printed[:4]:
        results = line["results"]
        assert results["share_equal_fp32"] == results["share_pictures_equal_fp32"] == 1.0
        assert results["images_per_second"] > 0
        assert results["images_per_second"] * results["latency_ms"] == pytest.approx(1e3 * line["batch"], rel=0.02)
        flops = results["images_per_second"] * line["gflop_per_image"] / 1e3
        assert results["model_tflops"] == pytest.approx(flops, rel=0.02)
        assert results["mfu"] == pytest.approx(results["model_tflops"] / 0.1, rel=0.02)
        assert line["model"] == "pretrained/nano" and line["hardware"]["cores"] and line["versions"]["torch"]
    assert printed[0]["results"]["times_plain"] == 1.0
    assert "CUDA graphs need" in printed[4]["results"]["error"], "a lever that fails is a line, not the end"


@pytest.mark.process
def test_unknown_levers_are_named() -> None:
    done = run("tokenizer.py", "--levers", "pakced")
    assert done.returncode == 1 and "pakced" in done.stderr and not done.stdout


@pytest.mark.process
def test_a_batch_larger_than_the_set_is_a_full_one() -> None:
    program = "import tokenizer; print(tuple(tokenizer.pictures(900, 64, 'pretrained/nano').shape))"
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src")])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=170, check=False,
                          env={**os.environ, "PYTHONPATH": path})
    assert done.stdout.strip() == "(900, 3, 64, 64)", done.stderr[-2000:]


@pytest.mark.process
def test_flags_that_time_nothing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import shared

    assert shared.batch_sizes("1,32") == [1, 32]
    assert shared.peak("0.5") == "0.5" and shared.peak("measured") == "measured"
    for check, texts in ((shared.batch_sizes, ("0", "1,", "x", "-1", "")), (shared.positive, ("0", "1.5")),
                         (shared.peak, ("0", "nan", "inf", "-1", "fast"))):
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError):
                check(text)
    done = run("tokenizer_training.py", "--batches", "1,0")
    assert done.returncode == 2 and "must be a whole number, 1 or more, not '0'" in done.stderr and not done.stdout


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, *arguments: str) -> str:
    """What a script says, in this process, before it ends with code 2."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(importlib.import_module(script).main())
    said = capsys.readouterr()
    assert ended.value.code == 2 and not said.out
    return said.err.splitlines()[-1]


@pytest.mark.parametrize(("script", "flag", "text", "sentence"), [
    ("llm_training", "--repeats", "0", "1 or more, not '0'"),
    ("llm_training", "--rows", "-1", "1 or more, not '-1'"),
    ("llm_training", "--length", "x", "1 or more, not 'x'"),
    ("llm_training", "--length", "75", "'75' is less than a picture with its caption can have (76)"),
    ("llm_training", "--peak-tflops", "abc", "'abc' is neither a number above 0 nor `measured`"),
    ("llm_training", "--dtype", "fp7", "Unknown dtype 'fp7'"),
    ("llm", "--prompt", "0", "1 or more, not '0'"), ("llm", "--new", "-3", "1 or more, not '-3'"),
    ("draw", "--steps", "0", "1 or more, not '0'"), ("draw", "--guidance", "nan", "'nan' is not a number"),
    ("llm", "--model", "pretrained/nan", "llm: pretrained/nan/system.json: there is no such file"),
    ("draw", "--model", "pretrained/nan", "draw: pretrained/nan/system.json: there is no such file")])
def test_wrong_flags_and_folders_are_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                                  script: str, flag: str, text: str, sentence: str) -> None:
    assert sentence in refused(monkeypatch, capsys, script, flag, text)


def test_a_system_that_draws_nothing_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "system.json").write_text('{"detokenizer": null}')
    said = refused(monkeypatch, capsys, "draw", "--model", str(tmp_path))
    assert said == f"draw: {tmp_path}/system.json: this system has no detokenizer."


def test_the_shortest_row_holds_every_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("llm_training")
    batch = module.packed_batch(module.VOCABULARIES["nano"], 16, module.LONGEST)
    assert batch.input_ids.shape == (16, 76) and batch.sequences >= 16
    assert max(len(draw()) for draw in [module.captions(module.VOCABULARIES["nano"])] for _ in range(3000)) == 76


def test_a_random_decoder_is_made_without_remarks_of_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from diffusers.utils import logging as loudness

    told: list[str] = []
    handler, before = logging.Handler(), loudness.get_verbosity()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("diffusers").addHandler(handler)
    loudness.set_verbosity_warning()  # or a command that ran before in this process has silenced it
    try:
        made = importlib.import_module("draw").random_detokenizer("nano", torch.device("cpu"), torch.float64)
    finally:
        loudness.set_verbosity(before)
        logging.getLogger("diffusers").removeHandler(handler)
    assert told == [] and made.pipeline.vae.dtype == made.pipeline.unet.dtype == torch.float64


@pytest.mark.process
def test_training_prints_throughput_and_memory() -> None:
    printed = lines("tokenizer_training.py", "--batches", "4", "--repeats", "1", "--dtype", "fp32",
                    "--peak-tflops", "0.1")
    assert [line["encoder"] for line in printed] == ["modules", "packed"]
    for line in printed:
        results = line["results"]
        assert results["images_per_second"] * results["seconds_per_step"] == pytest.approx(4, rel=0.01)
        assert 0 < results["mfu"] < 10 and results["peak_memory_gib"] > 0.05
        assert results["loss"] < results["first_loss"], "the same batch again and again is learned"
