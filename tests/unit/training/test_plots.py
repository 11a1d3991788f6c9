"""Curves of runs: what is read from logs of all kinds and ages, what is drawn, refusals in one sentence."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from seed_multimodal.cli.main import main
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.training import plots
from seed_multimodal.training.plots import draw_runs, find_logs, read_curves, save_curves

TOKENIZER = {"loss": 2.0, "loss_itc": 0.5, "lr": 1e-3, "samples_per_s": 80.0, "wait_share": 0.1, "codebook_used": 0.4,
             "perplexity": 12.0, "eta_seconds": 3.0, "peak_memory_mib": 9.0}
LANGUAGE = {"loss": 3.0, "text_loss": 4.0, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_s": 1e4,
            "wait_share": 0.0}


def write_log(folder: Path, name: str = "stage2", lines: Any = None, numbers: dict[str, float] = TOKENIZER) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log.jsonl"
    lines = lines or [json.dumps({"step": step, **numbers, "loss": numbers["loss"] / step}) for step in range(1, 9)]
    log.write_text("\n".join(lines) + "\n")
    return log


def test_lines_that_are_torn_empty_or_of_an_evaluation(tmp_path: Path) -> None:
    log = write_log(tmp_path, lines=[
        '{"step": 1, "loss": 4.0, "lr": 0.1}', "", "[1, 2]", '{"loss": 7.0}', '{"step": "2", "loss": 7.0}',
        '{"step": 2, "loss": NaN, "grad": Infinity, "note": "x", "done": true}', '{"step": 3, "loss": 2.0}',
        '{"step": 2, "valid/val/loss": 3.5, "valid/val/perplexity": 8.0}', '{"step": 3, "eval_text_loss": 1.5}',
        '{"step": 3, "loss": 1.0, "bad_samples": 2}', '{"step": 4, "loss": 1.'])
    curves = read_curves(log)
    assert {step: value for step, value in curves.trained["loss"].items() if value == value} == {1: 4.0, 3: 1.0}
    assert math.isnan(curves.trained["loss"][2]) and math.isnan(curves.trained["gradient norm"][2])
    assert curves.evaluated == {"val": {"loss": {2: 3.5}, "perplexity of the codes": {2: 8.0}},
                                "": {"text_loss": {3: 1.5}}}
    assert set(curves.trained) == {"loss", "learning rate", "gradient norm"}
    draw_runs([log], tmp_path / "odd.png")
    assert Image.open(tmp_path / "odd.png").size[0] > 300


def test_one_panel_for_both_names_of_the_learning_rate(tmp_path: Path) -> None:
    runs = [write_log(tmp_path / "a"), write_log(tmp_path / "b", "train", numbers=LANGUAGE)]
    curves = [read_curves(log) for log in runs]
    panels = plots._panels(curves)
    assert panels == ["loss", "loss_itc", "text_loss", "gradient norm", "learning rate", "samples/s", "tokens/s",
                      "share of time waiting for data", "share of codes used", "perplexity of the codes"]
    figure = plots._figure(curves)
    drawn = {axes.get_title(loc="left"): len(axes.get_lines()) for axes in figure.axes}
    assert drawn["learning rate"] == drawn["loss"] == 2 and drawn["text_loss"] == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a/stage2", "b/train"]


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    logs = [write_log(tmp_path / one / "out", "train") for one in ("small", "large")]
    assert plots._labels(logs) == ["small/out", "large/out"]
    assert plots._labels([tmp_path / f"{name}.log.jsonl" for name in ("vae", "clip")]) == ["vae", "clip"]
    assert plots._labels(logs[:1]) == ["out/train"]


def test_a_folder_stands_for_all_its_logs_but_old_ones(tmp_path: Path) -> None:
    logs = [write_log(tmp_path, name) for name in ("clip", "vae")]
    write_log(tmp_path, "vae").rename(tmp_path / "vae.log.old.jsonl")
    logs[1] = write_log(tmp_path, "vae")
    assert find_logs(tmp_path) == logs
    assert draw_runs([tmp_path, logs[0]], tmp_path / "all.svg") == logs
    assert (tmp_path / "all.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(("lines", "sentence"), [
    (None, "nothing: there is no such run"), ([], "holds no log of a training run"),
    (["not json", '{"step": 1}'], "stage2.log.jsonl: holds no line with a step and its numbers")])
def test_refusals_name_the_file(tmp_path: Path, lines: list[str] | None, sentence: str,
                                capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "nothing"
    if lines is not None:
        run.mkdir()
    if lines:
        write_log(run, lines=lines)
    assert main(["plot", str(run), "--out", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and str(run) in error and error.count("\n") == 1 and not (tmp_path / "x.png").exists()


def test_a_binary_file_and_a_wrong_ending_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="model.safetensors: holds no line"):
        draw_runs([tmp_path / "model.safetensors"], tmp_path / "x.png")
    with pytest.raises(ConfigError, match=r"x.doc: a figure ends with .png, .pdf or .svg"):
        draw_runs([write_log(tmp_path)], tmp_path / "x.doc")


@pytest.mark.slow
def test_the_command_names_what_it_drew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = [write_log(tmp_path / one) for one in ("a", "b")]
    out = tmp_path / "new" / "both.png"
    assert main(["plot", str(tmp_path / "a"), str(logs[1]), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"figure": str(out), "logs": [str(log) for log in logs]}
    assert Image.open(out).format == "PNG"


def test_a_run_leaves_its_curves_and_never_fails_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    write_log(tmp_path / "run")
    save_curves(tmp_path / "run", lines.append)
    assert not lines and Image.open(tmp_path / "run" / "curves.png").size[0] > 1000

    (tmp_path / "empty").mkdir()
    save_curves(tmp_path / "empty", lines.append)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    save_curves(tmp_path / "run", lines.append)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "run" / "curves.png"))

    monkeypatch.undo()
    monkeypatch.setattr(plots, "replacing", full)
    save_curves(tmp_path / "run", lines.append)
    reasons = ("holds no log", "needs the package matplotlib", "the disk or quota is full")
    for line, words in zip(lines, reasons, strict=True):
        assert "curves.png: the curves were not drawn" in line and words in line and "\n" not in line


@pytest.mark.process
def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = ("import sys, seed_multimodal.cli.main, seed_multimodal.training.plots\n"
            "assert 'matplotlib' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
