"""Optimizers and schedules: AdamW as in the original, Muon with AdamW, learning rates of the
original runs.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from seed_multimodal.training.config import OptimSettings, StageSettings
from seed_multimodal.training.optimizers import AdamWHf, MuonWithAdamW, build_optimizer
from seed_multimodal.training.schedules import learning_rate, optim_learning_rate


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


def test_part_rates_with_a_learning_rate_of_zero():
    # Only the parts move, each by its own rate.
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


@pytest.mark.parametrize("name", ["adamw_hf", "muon"])
def test_load_state_dict_continues_exactly(name):
    # As after a resume.
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


def test_adamw_hf_is_the_published_update():
    # Bias correction of the step, eps outside it, decay after the update.
    rate, (beta1, beta2), eps, decay = 0.1, (0.9, 0.95), 1e-5, 0.05
    value = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    parameter = nn.Parameter(value.clone())
    optimizer = AdamWHf([parameter], lr=rate, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    first = second = torch.zeros(4, dtype=torch.float64)
    for step in (1, 2, 3):
        parameter.grad = gradient = step * torch.tensor([0.3, -2.0, 1e-6, 0.0], dtype=torch.float64)
        optimizer.step()
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        size = rate * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        value = (value - size * first / (second.sqrt() + eps)) * (1 - rate * decay)
    torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=0)


def test_learning_rate_of_a_stage_with_warmup_and_floor():
    # Schedules of the originals are recorded (golden/lr_schedule).
    stage = StageSettings(max_steps=110, learning_rate=1.0, warmup_steps=10, min_lr_ratio=0.02)
    rates = [learning_rate(step, stage) for step in (0, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.51, 0.02])


def test_muon_updates_hidden_matrices_only():
    # Embeddings, the head and biases are AdamW's, as Muon's authors say.
    layers = {"embed": nn.Embedding(11, 8), "inner": nn.Linear(8, 8)}
    model = nn.ModuleDict({**layers, "lm_head": nn.Linear(8, 11, bias=False)})
    optimizer = MuonWithAdamW(model, lr=0.01, weight_decay=0.1)
    groups = optimizer.param_groups
    assert [id(value) for value in groups[0]["params"]] == [id(layers["inner"].weight)]
    everything = [id(value) for group in groups for value in group["params"]]
    assert sorted(everything) == sorted(id(value) for value in model.parameters())


def test_muon_updates_as_torchs_does_in_bfloat16():
    # Newton and Schulz's iteration in another precision differs a little.
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
