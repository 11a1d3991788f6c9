"""Optimizers and schedules: AdamW as in the original, Muon with AdamW, learning rates of the
original runs.
"""

import copy
import math

import pytest
import torch
from tensors import normal
from torch import nn
from yaml_tables import read_tables

from seed_multimodal.errors import ConfigError
from seed_multimodal.training.config import SCHEDULES, OptimSettings, StageSettings
from seed_multimodal.training.optimizers import (
    AdamWHf,
    MuonWithAdamW,
    build_optimizer,
    parameter_groups,
)
from seed_multimodal.training.schedules import optim_learning_rate
from seed_multimodal.training.task import StageTask


def toy() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 2))
    model[3].weight.requires_grad_(False)
    return model


def train(model, optimizer: torch.optim.Optimizer | MuonWithAdamW, steps):
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
        gradient = normal(step, 40, 24)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model.weight.grad = gradient.clone()
            optimizer.step()
    assert (ours.weight - theirs.weight).norm() < 0.03 * (theirs.weight - start).norm()


def test_optimizer_of_a_stage_is_that_of_its_settings():
    # Two steps of each equal those of the optimizer by its own class.
    for name in ("adamw", "muon"):
        ours, theirs = toy(), toy()
        theirs.load_state_dict(ours.state_dict())
        groups = parameter_groups(theirs.parameters(), 0.3)
        expected = (
            MuonWithAdamW(theirs, 0.02, 0.3)
            if name == "muon"
            else torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.99))
        )
        settings = StageSettings(max_steps=2, optimizer=name, learning_rate=0.02, weight_decay=0.3)
        train(ours, StageTask("toy", ours, settings).optimizer, 2)
        train(theirs, expected, 2)
        for key, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key]), (name, key)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_transformers(name):
    # By all names that the original's flag takes; only the cosine of SEED has a last rate.
    from transformers import get_scheduler

    settings = OptimSettings(lr_scheduler_type=name, warmup_ratio=0, warmup_steps=0)
    if name != "constant":
        settings.warmup_steps = 3
    if "min_lr_ratio" not in SCHEDULES[name]:
        settings.min_lr_ratio = 0.0
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=settings.learning_rate)
    schedule = get_scheduler(name, optimizer, settings.warmup_steps, 12)
    for step in range(12):
        rate = optim_learning_rate(step, settings, 12)
        assert rate == pytest.approx(schedule.get_last_lr()[0], rel=1e-2)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("settings", read_tables(__file__), ids=str)
def test_setting_that_is_not_read_is_an_error(settings):
    # By its name, not by a training that ignores it.
    with pytest.raises(ConfigError, match=list(settings)[-1]):
        build_optimizer(toy(), OptimSettings(**settings))
    muon = build_optimizer(toy(), OptimSettings(name="muon", adam_beta2=0.5, adam_epsilon=0.1))
    assert (muon.defaults["betas"][1], muon.defaults["eps"]) == (0.5, 0.1)
