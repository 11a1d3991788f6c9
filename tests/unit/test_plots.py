"""Curves of training runs: reading logs, the plot command."""

import json
from pathlib import Path

import pytest
from PIL import Image
from yaml_tables import read_tables

from seed_multimodal.cli.main import main
from seed_multimodal.plots import read_log, save_curves


def write_log(folder, lines=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "stage2.log.jsonl"
    values = {"loss_itc": 0.5, "lr": 1e-3, "samples_per_s": 80.0, "codebook_used": 0.4}
    lines = lines or [
        json.dumps({"step": step, "loss": 2.0 / step, **values}) for step in range(1, 9)
    ]
    log.write_text("\n".join(lines) + "\n")
    return log


def test_read_log_skips_torn_lines_and_separates_evaluations(tmp_path):
    table = read_tables(__file__)
    log = write_log(tmp_path, lines=table["lines"])
    assert read_log(log) == table["curves"]


def test_plot_command_with_another_format(tmp_path, capsys):
    # An error by its name, and no empty figure.
    log = write_log(tmp_path)
    assert main(["plot", str(log), "--out", str(tmp_path / "x.doc")]) == 2
    assert "'doc'" in capsys.readouterr().err
    assert not (tmp_path / "x.doc").exists()


@pytest.mark.slow
def test_plot_command_draws_several_runs(tmp_path, capsys):
    logs = [write_log(tmp_path / name) for name in ("a", "b")]
    out = tmp_path / "new" / "both.png"
    assert main(f"plot {tmp_path / 'a'} {logs[1]} --out {out} --json".split()) == 0
    assert json.loads(capsys.readouterr().out) == {
        "figure": str(out),
        "logs": [str(log) for log in logs],
    }
    assert Image.open(out).format == "PNG"


def test_save_curves_without_a_log_warns(tmp_path):
    # A finished training must not fail because its curves cannot be drawn.
    messages = []
    save_curves(tmp_path, messages.append)
    assert len(messages) == 1
