"""The training loop on the toy of support/loop_toy.py: equal to a plain loop, weights of batches,
precision, errors, intervals, log, warnings, other checkpoints."""

import time
from dataclasses import replace

import loop_toy as toy
import pytest
import torch
from torch import nn

from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.distributed import TrainingError
from seed_multimodal.training.optimizers import Ema, parameter_groups
from seed_multimodal.training.schedules import learning_rate
from seed_multimodal.training.task import StageTask
from seed_multimodal.training.trainer import train_stage


def plain_loop(precision: str) -> tuple[list[float], str]:
    """The same training in plain PyTorch, twelve steps."""
    model, data = toy.toy_model()
    settings = StageSettings(max_steps=12, batch_size=8, learning_rate=1e-2, warmup_steps=5)
    optimizer = torch.optim.AdamW(
        parameter_groups(model.parameters(), 0.01), lr=1e-2, betas=(0.9, 0.99)
    )
    average = Ema(model, 0.9)
    losses = []
    for step in range(12):
        torch.manual_seed(3 * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        with torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
            value = toy.toy_loss(model, data, toy.batch_indices(step), 0.1)
        losses.append(value.item())
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step)
        toy.move_bias(model)
    average.swap(model)
    return losses, sum(p.double().sum().item() for p in model.parameters()).hex()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_train_stage_equals_a_plain_loop_bitwise(tmp_path, precision):
    # Precision, clipping, rates and averages are those of twenty lines of PyTorch.
    losses, total = plain_loop(precision)
    record = toy.train(tmp_path, precision=precision)
    assert toy.read_losses(tmp_path) == dict(enumerate(losses))
    assert record["sum"] == total
    assert (record["steps"], record["batch_size"]) == (12, 8)


class WeightedTask(StageTask):
    """Two micro-batches a step, of five in all: rows of data, weighted by their number."""

    sizes = (3, 1, 4, 2, 5)
    samples: list[int] = []

    def batches(self, step):
        return [torch.arange(size) for size in self.sizes[2 * step : 2 * step + 2]]

    def weight(self, batch):
        return len(batch)

    def loss(self, model, batch):
        x = toy.toy_model()[1][[] if batch is None else batch]
        loss = (model(x) - x.sum(1, keepdim=True)).square().sum()
        return loss, {"rows": float(len(x))}

    def write_samples(self, run):
        self.samples.append(run.step)


def test_losses_are_sums_over_the_weights_of_a_step(tmp_path, capsys):
    # A row counts the same in a small and in a large micro-batch, and where the data end.
    settings = StageSettings(
        max_steps=9, gradient_accumulation_steps=2, logging_steps=1, warmup_steps=2, curves=False,
        precision="fp32",
    )  # fmt: skip
    model, data = toy.toy_model()
    record = train_stage(WeightedTask("toy", model, settings), tmp_path)
    assert record["steps"] == 3 and "exhausted after step 3" in capsys.readouterr().out

    plain, _ = toy.toy_model()
    groups = parameter_groups(plain.parameters(), settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    means = []
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        rows = [row for size in WeightedTask.sizes[2 * step : 2 * step + 2] for row in range(size)]
        x = data[rows]
        loss = (plain(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        means.append(loss.item())
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    lines = toy.log_lines(tmp_path)
    smoothed = means[0]
    for line, mean in zip(lines, means, strict=True):
        smoothed = 0.95 * smoothed + 0.05 * mean
        assert line["loss"] == pytest.approx(smoothed, rel=1e-5)
        assert line["rows"] == pytest.approx(1)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_intervals_of_evaluations_samples_checkpoints_and_log_lines(tmp_path):
    # Each once, and evaluation, log and checkpoint also at the end.
    settings = StageSettings(
        max_steps=2, gradient_accumulation_steps=2, logging_steps=2, save_steps=1, curves=False,
        save_total_limit=None,
    )  # fmt: skip
    task = WeightedTask("toy", toy.toy_model()[0], settings)
    task.sizes = (2,) * 14
    task.samples = []
    evaluated = []

    def evaluate(run):
        evaluated.append(run.step)
        assert run.model is task.module and run.evaluation.get("step", 0) < run.step
        return {"eval_loss": float(run.step)}

    task.evaluate = evaluate
    task.sample_steps = 3
    task.eval_steps = 2
    task.settings = replace(settings, max_steps=7, logging_steps=5, save_steps=4)
    train_stage(task, tmp_path)
    assert evaluated == [2, 4, 6, 7]
    assert task.samples == [3, 6]
    assert toy.steps(tmp_path) == [7, 4]
    lines = toy.log_lines(tmp_path)
    assert [line["step"] for line in lines if "eval_loss" in line] == evaluated
    assert [line["step"] for line in lines if "loss" in line] == [5, 7]


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"max_steps": 0}, "max_steps 0"),
        ({"learning_rate": 0.0}, "learning rate is 0"),
        ({"warmup_steps": 500, "max_steps": 2}, "reaches 4e-05 of 0.01 in 2 steps"),
        ({"warmup_steps": 9, "max_steps": 4}, "warm-up"),
        ({"warmup_steps": 8, "max_steps": 4}, ""),
        ({"lr_scheduler_type": "linear", "warmup_steps": 0}, ""),
        ({"frozen": True}, "gradient was exactly 0 in 3 steps"),
        ({"frozen": True, "max_steps": 2, "warmup_steps": 1}, "gradient was exactly 0 in 2 steps"),
    ],
)
def test_run_that_cannot_change_anything_says_so(tmp_path, capsys, settings, named):
    # Once: else a wrong setting looks like a finished training.
    toy.train(tmp_path, noise=0, **settings)
    output = capsys.readouterr().out
    assert output.count("warning") == bool(named and "max_steps 0" not in named)
    assert named in output


def test_fp16_skips_steps_that_overflow(tmp_path):
    # Weights do not change at such a step; the halved loss scale is saved and restored.
    model = nn.Linear(4, 1)
    weights = []

    def scale(step):
        weights.append(model.weight.detach().clone())
        return 1e30 if step == 0 else 1.0

    toy.run_square(tmp_path, model, scale, max_steps=3, precision="fp16")
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    # One infinite norm, which JSON cannot hold, is no reason to log only such.
    norms = [line["grad"] for line in toy.log_lines(tmp_path)]
    assert [norm is None for norm in norms] == [True, False, False]
    (tmp_path / "toy.done.json").unlink()
    toy.run_square(tmp_path, model, scale, max_steps=5, precision="fp16")
    assert len(weights) == 5
    assert toy.saved(tmp_path)["scaler"]["scale"] == 2.0**15
    with pytest.raises(TrainingError):  # no scale is small enough
        toy.run_square(tmp_path / "hot", model, lambda step: 1e36, max_steps=100, precision="fp16")


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_train_stage_stops_at_a_loss_that_is_not_finite(tmp_path, bad):
    # The weights of a user's run are kept, those of the last checkpoint and those in memory.
    model = nn.Linear(3, 1, bias=False)
    before = []

    def loss(step):
        value = model(torch.ones(2, 3)).square().mean()
        if step == 5:
            before.append(model.weight.detach().clone())
            infinite_slope = (model.weight * 0).sum().sqrt()
            value = value * float("nan") if bad == "loss" else value + infinite_slope
        return value, {}

    settings = StageSettings(max_steps=9, batch_size=2, precision="fp32", save_steps=4)
    with pytest.raises(TrainingError, match=r"step 6\b.*checkpoint-4"):
        toy.run_stage("toy", model, loss, settings, tmp_path)
    assert toy.saved(tmp_path)["global_step"] == 4
    assert torch.equal(before[0], model.weight)
    assert not (tmp_path / "toy.done.json").exists()


def test_resume_with_other_micro_batches(tmp_path):
    # The same number of samples per step is the same run.
    with pytest.raises(SystemExit):
        toy.train(tmp_path, stop_at=6)
    toy.train(tmp_path, batch_size=4, gradient_accumulation_steps=2)


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
