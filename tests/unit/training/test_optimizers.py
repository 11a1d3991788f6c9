"""Optimizers and schedules: AdamW as in the original, Muon with AdamW, learning rates of the
original runs.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.training.config import OptimSettings, StageSettings
from seed_multimodal.training.optimizers import AdamWHf, MuonWithAdamW, build_optimizer
from seed_multimodal.training.schedules import learning_rate, optim_learning_rate, scheduled_rate


def toy() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 2))
    model[3].weight.requires_grad_(False)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer | MuonWithAdamW, steps: int) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        ids = torch.randint(0, 6, (8,), generator=generator)
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()


def by_hand(
    values: list[float],
    gradients: list[list[float]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> list[float]:
    """The published update in plain Python."""
    first = [0.0] * len(values)
    second = [0.0] * len(values)
    for t, now in enumerate(gradients, start=1):
        for i, g in enumerate(now):
            first[i] = betas[0] * first[i] + (1 - betas[0]) * g
            second[i] = betas[1] * second[i] + (1 - betas[1]) * g * g
            size = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
            values[i] -= size * first[i] / (math.sqrt(second[i]) + eps)
            values[i] -= lr * decay * values[i]
    return values


def test_part_rates_with_a_learning_rate_of_zero():
    """Only the parts move, each by its own rate."""
    settings = OptimSettings(
        learning_rate=0.0,
        part_rates={"1": 1e-2, "2": 5e-3},
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        weight_decay=0.0,
    )
    model = toy()
    peak = optim_learning_rate(0, settings, 10)
    before = copy.deepcopy(model)
    optimizer = build_optimizer(model, settings)
    for group in optimizer.param_groups:
        group["lr"] = peak * group.get("lr_scale", 1.0)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.0, 5e-3, 1e-2]
    train(model, optimizer, 1)
    moved = {
        name
        for name, value in model.named_parameters()
        if not torch.equal(value, before.state_dict()[name])
    }
    assert moved == {"1.weight", "1.bias", "2.weight"}


def test_adamw_hf_is_the_published_update():
    gradients = [[0.3, -2.0, 1e-6, 0.0], [-0.1, -1.0, 2e-6, 0.0], [0.5, 3.0, -1e-6, 0.0]]
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64))
    other = nn.Parameter(parameter.detach().float())
    optimizer = AdamWHf([parameter, other], lr=0.1, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.05)
    for now in gradients:
        parameter.grad = torch.tensor(now, dtype=torch.float64)
        other.grad = torch.tensor(now)
        optimizer.step()
    expected = by_hand([1.0, -2.0, 0.5, 3.0], gradients, 0.1, (0.9, 0.95), 1e-5, 0.05)
    assert parameter.tolist() == pytest.approx(expected, rel=1e-12)
    assert other.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adamw_hf", "muon"])
def test_load_state_dict_continues_exactly(name):
    settings = OptimSettings(name=name, learning_rate=1e-2)
    intact = toy()
    broken = toy()
    optimizer = build_optimizer(intact, settings)
    first = build_optimizer(broken, settings)
    train(intact, optimizer, 3)
    train(broken, first, 3)
    again = build_optimizer(broken, settings)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    train(intact, optimizer, 2)
    train(broken, again, 2)
    assert all(
        torch.equal(a, b) for a, b in zip(intact.parameters(), broken.parameters(), strict=True)
    )


def test_build_optimizer_decays_norms_as_the_original():
    model = toy()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = build_optimizer(model, OptimSettings()).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(len(trained), 0.05)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="Nothing to train"):
        build_optimizer(model, OptimSettings())


def test_schedule_with_warmup_and_floor():
    settings = OptimSettings(learning_rate=2.0, warmup_ratio=0.1, min_lr_ratio=0.25)
    assert [optim_learning_rate(t, settings, 20) for t in (0, 1, 2)] == [0.0, 1.0, 2.0]
    assert (
        optim_learning_rate(20, settings, 20)
        == optim_learning_rate(200, settings, 20)
        == pytest.approx(0.5)
    )
    assert scheduled_rate("linear", 10, 2.0, 20, floor=0.5) == pytest.approx(1.5)
    assert scheduled_rate("constant", 0, 2.0, 20, warmup=5) == 2.0
    assert scheduled_rate("constant_with_warmup", 1, 2.0, 20, warmup=4) == 0.5


def test_scheduled_rate_of_an_unknown_schedule():
    with pytest.raises(KeyError, match="polynomial"):
        scheduled_rate("polynomial", 10, 2.0, 20)
    with pytest.raises(KeyError, match="polynomial"):
        optim_learning_rate(10, OptimSettings(lr_scheduler_type="polynomial"), 20)
    with pytest.raises(KeyError, match="polynomial"):
        learning_rate(10, StageSettings(max_steps=20, lr_scheduler_type="polynomial"))


def test_schedule_equals_the_log_of_the_original_run():
    """`trainer_state.json` of the original 8B pretraining: 3e-5, 20,000 steps, 3 % warm-up, 5 %
    floor.
    """
    settings = OptimSettings(learning_rate=3e-5, warmup_ratio=0.03, min_lr_ratio=0.05)
    logged = {
        1: 5.0000000000000004e-08,
        600: 3e-05,
        631: 2.9999820442467018e-05,
        761: 2.9995157068734853e-05,
        19989: 1.5000226082220341e-06,
        20000: 1.5e-06,
    }
    for step, rate in logged.items():
        assert optim_learning_rate(step, settings, 20000) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
def test_schedule_equals_that_of_transformers(kind):
    """Without a floor; stages count from 1 (and their cosine in another way)."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    stepped = get_scheduler(kind, optimizer, 4, 20)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        stepped.step()
    settings = OptimSettings(
        learning_rate=2.0, warmup_steps=4, min_lr_ratio=0.0, lr_scheduler_type=kind
    )
    assert [optim_learning_rate(step, settings, 20) for step in range(20)] == pytest.approx(
        expected, rel=1e-12, abs=1e-15
    )
    stage = StageSettings(
        max_steps=20, learning_rate=2.0, warmup_steps=4, min_lr_ratio=0.0, lr_scheduler_type=kind
    )
    if kind != "cosine":
        assert [learning_rate(step, stage) for step in range(19)] == pytest.approx(
            expected[1:], rel=1e-12, abs=1e-15
        )


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.1), (9, 1.0), (10, 1.0), (60, 0.51), (110, 0.02)]
)
def test_learning_rate_of_a_stage(step, expected):
    settings = StageSettings(max_steps=110, learning_rate=1.0, warmup_steps=10, min_lr_ratio=0.02)
    assert learning_rate(step, settings) == pytest.approx(expected)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(torch.relu(self.inner(self.embed(ids))))


def losses_of(model: nn.Module, optimizer: MuonWithAdamW, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(11, (32,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(ids), (ids * 3 + 1) % 11)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_muon_updates_hidden_matrices_only():
    model = Toy()
    optimizer = MuonWithAdamW(model, lr=0.01, weight_decay=0.1)
    muon = optimizer.param_groups[0]["params"]
    assert len(muon) == 1 and muon[0] is model.inner.weight
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in everything} == {id(p) for p in model.parameters()} and len(
        everything
    ) == 4
    bias = next(
        g for g in optimizer.param_groups if any(p is model.inner.bias for p in g["params"])
    )
    assert bias["weight_decay"] == 0.0
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    losses_of(model, optimizer, range(1))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_muon_updates_as_torchs_does_in_bfloat16():
    ours = nn.Linear(24, 40, bias=False)
    theirs = nn.Linear(24, 40, bias=False)
    theirs.load_state_dict(ours.state_dict())
    start = ours.weight.detach().clone()
    optimizers = (
        MuonWithAdamW(ours, 0.01, 0.1),
        torch.optim.Muon(
            theirs.parameters(), lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
    )
    for step in range(3):
        gradient = torch.randn(40, 24, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model.weight.grad = gradient.clone()
            optimizer.step()
    assert (ours.weight - theirs.weight).norm() < 0.03 * (theirs.weight - start).norm()


def test_muon_lowers_the_loss():
    torch.manual_seed(0)
    model = Toy()
    losses = losses_of(model, MuonWithAdamW(model, lr=0.02, weight_decay=0.0), range(60))
    assert losses[-1] < 0.2 * losses[0]
