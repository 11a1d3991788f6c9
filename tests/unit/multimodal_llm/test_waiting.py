"""Steps between log lines never wait for the device, and their numbers are the same."""

from __future__ import annotations

import json

import pytest
from no_waiting import guard_steps

from seed_multimodal.training.llm.loss import LossModule
from seed_multimodal.training.llm.task import LlmTask


@pytest.mark.parametrize("more", [
    [], ["data.packing=false"], ["trainer.loss_kernel=chunked", "trainer.gradient_accumulation_steps=2"],
    ["trainer.gradient_checkpointing=true", "trainer.precision=bf16"]])
def test_a_step_that_is_not_logged_waits_for_nothing(train, monkeypatch, more):
    # The count of learned tokens and the facts of rows are taken from batches on the CPU.
    guarded = guard_steps(monkeypatch, (LlmTask, "begin_step"), (LossModule, "facts"))
    train("run", "trainer.logging_steps=4", *more)
    assert guarded == [1, 2, 4, 5, 6]


@pytest.mark.slow
def test_numbers_that_are_read_later_are_the_same(train):
    """Sums of a line's steps, whenever they are read; the last line of both runs stands for the last steps' sum."""
    lines = []
    for every in (1, 4):
        folder = train(f"every-{every}", f"trainer.logging_steps={every}")
        log = [json.loads(line) for line in (folder / "train.log.jsonl").read_text().splitlines()]
        lines.append({line["step"]: line for line in log})
    assert sorted(lines[1]) == [4, 8]
    for last in (4, 8):
        steps = [lines[0][step] for step in range(last - 3, last + 1)]
        assert lines[1][last]["loss"] == pytest.approx(sum(line["loss"] for line in steps) / 4, abs=1e-12)
        for key in ("grad_norm", "learning_rate", "tokens"):
            assert lines[1][last][key] == steps[-1][key]
