"""The training loop: sample order, accumulation, precision, resume, errors."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

import loop_toy as toy
import pytest
import torch
from torch import nn

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.distributed import TrainingError
from seed_multimodal.training.optimizers import Ema, parameter_groups
from seed_multimodal.training.schedules import batch_indices, learning_rate


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
            value = toy.toy_loss(model, data, batch_indices(step, 8, 64, 3), 0.1)
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
    losses, total = plain_loop(precision)
    record = toy.train(tmp_path, precision=precision)
    assert toy.read_losses(tmp_path) == dict(enumerate(losses)) and record["sum"] == total
    assert {k: v for k, v in record.items() if k not in ("seconds", "sum")} == {
        "stage": "toy",
        "steps": 12,
        "batch_size": 8,
    }


def test_gradient_accumulation_equals_the_full_batch(tmp_path):
    toy.train(tmp_path / "whole", batch_size=16, noise=0)
    toy.train(tmp_path / "parts", batch_size=4, gradient_accumulation_steps=4, noise=0)
    full_batch = toy.read_losses(tmp_path / "whole")
    parts = toy.read_losses(tmp_path / "parts")
    assert len(parts) == 4 * len(full_batch) == 48
    means = [sum(parts[4 * step + m] for m in range(4)) / 4 for step in full_batch]
    assert means == pytest.approx(list(full_batch.values()), rel=1e-5)
    files = [toy.saved(tmp_path / run) for run in ("whole", "parts")]
    torch.testing.assert_close(files[1]["model"], files[0]["model"], rtol=1e-4, atol=1e-6)
    assert [file["samples_per_step"] for file in files] == [16, 16]


def test_fp16_skips_steps_that_overflow(tmp_path):
    """Weights do not change at a step whose scaled gradients overflow.

    The halved scale is saved and restored.
    """
    model = nn.Linear(4, 1)
    x = torch.ones(2, 4)
    scales = []
    weights = []

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        weights.append(model.weight.detach().clone())
        return (model(x).float() ** 2).mean() * (1e30 if step == 1 else 1.0), {}

    def run(steps: int) -> None:
        settings = StageSettings(
            max_steps=steps, batch_size=2, warmup_steps=1, precision="fp16", logging_steps=1
        )
        toy.run_stage(f"half{steps}", model, loss, settings, tmp_path)
        scales.append(toy.saved(tmp_path, f"half{steps}")["scaler"]["scale"])

    run(3)
    assert scales == [2.0**15]
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    (tmp_path / "half3.checkpoints").rename(tmp_path / "half5.checkpoints")
    run(5)
    assert len(weights) == 5 and scales == [2.0**15, 2.0**15]
    with pytest.raises(TrainingError, match="overflow at any loss scale"):
        toy.run_stage(
            "hot",
            model,
            lambda step: ((model(x).float() ** 2).mean() * 1e36, {}),
            StageSettings(max_steps=100, batch_size=2, precision="fp16"),
            tmp_path,
        )


def test_fp16_overflow_in_the_first_step_affects_one_log_line(tmp_path):
    model = nn.Linear(4, 1)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        return (model(torch.ones(2, 4)).float() ** 2).mean() * (1e30 if step == 0 else 1.0), {}

    settings = StageSettings(
        max_steps=3, batch_size=2, warmup_steps=1, precision="fp16", logging_steps=1
    )
    toy.run_stage("half", model, loss, settings, tmp_path)
    norms = [
        json.loads(line)["grad"] for line in (tmp_path / "half.log.jsonl").read_text().splitlines()
    ]
    assert [math.isfinite(norm) for norm in norms] == [False, True, True]


def test_train_stage_with_another_optimizer_and_schedule(tmp_path):
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    groups = [{"params": [model.weight], "lr_scale": 0.5}]
    toy.run_stage(
        "sgd",
        model,
        lambda step: (model.weight.sum(), {}),
        StageSettings(max_steps=2, max_grad_norm=0, precision="fp32"),
        tmp_path,
        optimizer=torch.optim.SGD(groups, lr=9.0),
        methods={"learning_rate": lambda step: 0.1 * (step + 1)},
    )
    torch.testing.assert_close(model.weight.detach(), torch.full((2, 3), 1.0 - 0.05 - 0.1))


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (
            "loss",
            r"The loss became nan at step 6; the last checkpoint \(.*checkpoint-4\) is intact\.",
        ),
        (
            "gradient",
            r"The gradient norm became nan at step 6; the last checkpoint \(.*checkpoint-4\) is "
            r"intact\.",
        ),
    ],
)
def test_train_stage_stops_at_a_loss_that_is_not_finite(tmp_path, failure, sentence):
    model = nn.Linear(3, 1, bias=False)
    before: list[torch.Tensor] = []

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        value = model(torch.ones(2, 3)).square().mean()
        if step == 5:
            before.append(model.weight.detach().clone())
            value = (
                value * float("nan")
                if failure == "loss"
                else value + (model.weight * 0).sum().sqrt()
            )
        return value, {}

    settings = StageSettings(max_steps=9, batch_size=2, precision="fp32", save_steps=4)
    with pytest.raises(TrainingError, match=sentence):
        toy.run_stage("bad", model, loss, settings, tmp_path)
    assert toy.saved(tmp_path, "bad")["global_step"] == 4
    assert torch.equal(before[0], model.weight) and not (tmp_path / "bad.done.json").exists()


def test_resume_from_the_checkpoint_of_another_run_fails(tmp_path):
    with pytest.raises(SystemExit):
        toy.train(tmp_path, stop_at=6)
    content = toy.content(tmp_path)
    with pytest.raises(CheckpointError, match=r"saved with samples per step 8, this run has 16"):
        toy.train(tmp_path, batch_size=16)
    with pytest.raises(CheckpointError, match=r"saved with samples per step 8, this run has 24"):
        toy.train(tmp_path, gradient_accumulation_steps=3)

    def resume(model: nn.Module, **more: Any) -> None:
        toy.run_stage(
            "toy",
            model,
            lambda step: (model(torch.ones(2, 8)).mean(), {}),
            StageSettings(max_steps=8, batch_size=8, ema=0.9),
            tmp_path,
            **more,
        )

    with pytest.raises(CheckpointError, match="have another size, first '0.weight'"):
        resume(nn.Sequential(nn.Linear(8, 17), nn.Tanh(), nn.Linear(17, 1)))
    model, _ = toy.toy_model()
    with pytest.raises(CheckpointError, match="another optimizer"):
        resume(model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    every = torch.optim.AdamW(parameter_groups(model.parameters(), 0.0))
    model[0].bias.requires_grad_(False)
    with pytest.raises(CheckpointError, match="averaged weights are of other trained parameters"):
        resume(model, optimizer=every)
    assert toy.content(tmp_path) == content
    weights = toy.newest(tmp_path) / "model.safetensors"
    weights.write_bytes(content[weights.name][:500])
    with pytest.raises(CheckpointError, match="model.safetensors: not a complete weights file"):
        toy.train(tmp_path)
    weights.write_bytes(content[weights.name])
    toy.train(
        tmp_path, batch_size=4, gradient_accumulation_steps=2
    )  # the same number of samples per step


def test_ema_starts_at_a_resume(tmp_path):
    with pytest.raises(SystemExit):
        toy.train(tmp_path, stop_at=6, ema=0.0)
    before = toy.saved(tmp_path)
    assert before["ema"] == {} and before["global_step"] == 7
    toy.train(tmp_path, ema=0.999, learning_rate=0.0, noise=0)
    after = toy.saved(tmp_path)
    torch.testing.assert_close(after["ema"], dict(before["model"]))


def test_checkpoints_without_frozen_weights(tmp_path):
    def run(model: nn.Sequential, steps: int, **more: Any) -> None:
        model[0].requires_grad_(False)
        settings = StageSettings(
            max_steps=steps, batch_size=2, precision="fp32", learning_rate=0.1, **more
        )
        toy.run_stage(
            f"thaw{steps}",
            model,
            lambda step: (model(torch.ones(2, 3)).square().mean(), {}),
            settings,
            tmp_path,
        )

    def model(seed: int = 0) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    first = model()
    run(first, 3, save_frozen=False)
    assert set(toy.saved(tmp_path, "thaw3")["model"]) == {
        name for name in first.state_dict() if not name.startswith("0.")
    }
    for steps in (5, 6):
        shutil.copytree(tmp_path / "thaw3.checkpoints", tmp_path / f"thaw{steps}.checkpoints")
    run(model(), 5, save_frozen=True)
    assert "0.weight" in toy.saved(tmp_path, "thaw5")["model"]
    with pytest.raises(CheckpointError, match="another set of frozen weights"):
        run(model(seed=7), 6, save_frozen=False)


def test_batch_indices_contain_every_sample_once_per_epoch():
    indices = torch.cat([batch_indices(step, 8, 30, seed=3) for step in range(15)])
    for epoch in range(4):
        assert sorted(indices[epoch * 30 : (epoch + 1) * 30].tolist()) == list(range(30))
    assert not torch.equal(indices[:30], indices[30:60])


@pytest.mark.parametrize(
    ("key", "value"), [("precision", "float32"), ("batch_size", 0), ("ema", 1.0)]
)
def test_train_stage_with_wrong_values(tmp_path, key, value):
    model = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=f"{key} must be"):
        toy.run_stage(
            "x",
            model,
            lambda step: (model.weight.sum(), {}),
            StageSettings(**{"max_steps": 1, key: value}),
            tmp_path / "x",
        )
    assert not (tmp_path / "x").exists()


def test_warm_start_loads_averaged_weights(tmp_path):
    def run(name: str, model: torch.nn.Module, **more: object) -> dict:
        settings = StageSettings(
            max_steps=3, batch_size=2, warmup_steps=1, precision="fp32", ema=0.5, **more
        )
        x = torch.ones(2, 3)
        return toy.run_stage(
            name, model, lambda step: ((model(x) ** 2).mean(), {}), settings, tmp_path / name
        )

    first = torch.nn.Linear(3, 2)
    run("first", first)
    second = torch.nn.Linear(3, 2)
    run("second", second, start=str(tmp_path / "first" / "first.checkpoints"), learning_rate=0.0)
    torch.testing.assert_close(second.weight, first.weight)
    with pytest.raises(CheckpointError, match="another size"):
        run("third", torch.nn.Linear(3, 4), start=str(tmp_path / "first" / "first.checkpoints"))
