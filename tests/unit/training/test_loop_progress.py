"""The log of a training run: console lines, JSON lines."""

import time

import loop_toy as toy
import pytest


def test_log_lines_hold_losses_speed_and_status(tmp_path, capsys):
    # What users and dashboards read from the JSON lines and the console.
    calls = []

    def status():
        calls.append(time.monotonic())
        return {"wait_seconds": 0.25 * (calls[-1] - calls[0]), "bad_samples": 3, "perplexity": 12.5}

    toy.train(tmp_path, status=status, pause=0.01, max_steps=10, gradient_accumulation_steps=2)
    lines = toy.log_lines(tmp_path)
    assert [line["step"] for line in lines] == [4, 8, 10]
    for line in lines:
        assert line["half"] == pytest.approx(line["loss"] / 2)
        assert line["samples_per_s"] * line["seconds_per_step"] == pytest.approx(16)
        assert line["seconds_per_step"] >= 0.02
        assert line["wait_share"] == pytest.approx(0.25, abs=0.05)
        assert (line["bad_samples"], line["perplexity"]) == (3, 12.5)
        assert 20 < line["peak_memory_mib"] < 100_000
    assert lines[0]["eta_seconds"] == pytest.approx(6 * lines[0]["seconds_per_step"])
    assert lines[-1]["eta_seconds"] == 0
    # The rate of the fourth step of a warm-up over five to 1e-2.
    assert lines[0]["lr"] == pytest.approx(8e-3)
    output = capsys.readouterr().out.splitlines()
    assert len(output) == 4
    assert "4/10" in output[0] and "perplexity 12.5" in output[0]


def test_resume_drops_log_lines_after_the_checkpoint(tmp_path):
    # A curve has one value for each step, also after a kill in the middle of a line.
    with pytest.raises(SystemExit):
        toy.train(tmp_path, stop_at=6, logging_steps=1)
    log = tmp_path / "toy.log.jsonl"
    assert [line["step"] for line in toy.log_lines(tmp_path)] == list(range(1, 8))
    with open(log, "a") as file:
        file.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')  # killed while writing
    toy.train(tmp_path, logging_steps=1)
    assert [line["step"] for line in toy.log_lines(tmp_path)] == list(range(1, 13))
