"""Optimisers: the original's AdamW number by number, its one group, settings, and the schedules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import read_settings
from seed_multimodal.training.config import StageConfig
from seed_multimodal.training.optimizers import AdamWHf, MuonWithAdamW, OptimSettings, build_optimizer, schedule
from seed_multimodal.training.schedules import USABLE, learning_rate, scheduled_rate
from seed_multimodal.training.task import StageTask


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


def by_hand(values: list[float], gradients: list[list[float]], lr: float, betas: tuple[float, float], eps: float,
            decay: float) -> list[float]:
    """The published update in plain Python, one number after the other."""
    first, second = [0.0] * len(values), [0.0] * len(values)
    for t, now in enumerate(gradients, start=1):
        for i, g in enumerate(now):
            first[i] = betas[0] * first[i] + (1 - betas[0]) * g
            second[i] = betas[1] * second[i] + (1 - betas[1]) * g * g
            size = lr * math.sqrt(1 - betas[1]**t) / (1 - betas[0]**t)
            values[i] -= size * first[i] / (math.sqrt(second[i]) + eps)
            values[i] -= lr * decay * values[i]
    return values


def test_adamw_hf_is_the_published_update() -> None:
    gradients = [[0.3, -2.0, 1e-6, 0.0], [-0.1, -1.0, 2e-6, 0.0], [0.5, 3.0, -1e-6, 0.0]]
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64))
    other = nn.Parameter(parameter.detach().float())
    optimizer = AdamWHf([parameter, other], lr=0.1, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.05)
    for now in gradients:
        parameter.grad, other.grad = torch.tensor(now, dtype=torch.float64), torch.tensor(now)
        optimizer.step()
    wanted = by_hand([1.0, -2.0, 0.5, 3.0], gradients, 0.1, (0.9, 0.95), 1e-5, 0.05)
    assert parameter.tolist() == pytest.approx(wanted, rel=1e-12)
    assert other.tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adamw_hf", "muon"])
def test_states_go_on_exactly(name: str) -> None:
    settings = OptimSettings(name=name, learning_rate=1e-2)
    whole, broken = toy(), toy()
    kept, first = build_optimizer(whole, settings), build_optimizer(broken, settings)
    train(whole, kept, 3)
    train(broken, first, 3)
    again = build_optimizer(broken, settings)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    train(whole, kept, 2)
    train(broken, again, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters(), strict=True))


def test_decay_reaches_norms_as_released_unless_told() -> None:
    model = toy()
    trained = [p for p in model.parameters() if p.requires_grad]
    released = build_optimizer(model, OptimSettings()).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in released] == [(len(trained), 0.05)]
    matrices = build_optimizer(model, OptimSettings(decay="matrices")).param_groups
    assert [(sorted(p.ndim for p in g["params"]), g["weight_decay"]) for g in matrices] == [
        ([2, 2], 0.05), ([1, 1, 1], 0.0)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer(model, OptimSettings())


def test_schedules() -> None:
    settings = OptimSettings(learning_rate=2.0, warmup_ratio=0.1, min_lr_ratio=0.25)
    assert [schedule(t, settings, 20) for t in (0, 1, 2)] == [0.0, 1.0, 2.0]
    assert schedule(20, settings, 20) == schedule(200, settings, 20) == pytest.approx(0.5)
    assert scheduled_rate("linear", 10, 2.0, 20, floor=0.5) == pytest.approx(1.5)
    assert scheduled_rate("constant", 0, 2.0, 20, warmup=5) == 2.0
    assert scheduled_rate("constant_with_warmup", 1, 2.0, 20, warmup=4) == 0.5
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        scheduled_rate("cosinus", 0, 1.0, 2)


def test_released_run_to_all_printed_digits() -> None:
    """`trainer_state.json` of the released 8B pretraining: 3e-5, 20,000 steps, 3 % warm-up, 5 % floor."""
    settings = OptimSettings(learning_rate=3e-5, warmup_ratio=0.03, min_lr_ratio=0.05)
    logged = {1: 5.0000000000000004e-08, 600: 3e-05, 631: 2.9999820442467018e-05, 761: 2.9995157068734853e-05,
              19989: 1.5000226082220341e-06, 20000: 1.5e-06}
    for step, rate in logged.items():
        assert schedule(step, settings, 20000) == pytest.approx(rate, rel=1e-12)


# Options that a schedule needs, or that differ from its defaults.
OPTIONS = {"cosine_with_restarts": {"num_cycles": 3}, "polynomial": {"power": 2.0},
           "inverse_sqrt": {"timescale": 7}, "warmup_stable_decay": {"num_decay_steps": 6, "decay_type": "1-sqrt"}}


def transformers_rates(kind: str, warmup: int, total: int, options: dict) -> list[float]:
    """The rates of transformers' own scheduler, stepped as its Trainer does."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    made = get_scheduler(kind, optimizer, warmup, total, options or None)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return rates


@pytest.mark.parametrize("kind", USABLE)
def test_every_schedule_is_that_of_transformers(kind: str) -> None:
    """Without a floor; a language model's warm-up starts at 0, and so does transformers'."""
    options = OPTIONS.get(kind, {})
    settings = read_settings(OptimSettings, {"learning_rate": 2.0, "warmup_steps": 4, "min_lr_ratio": 0.0,
                                             "lr_scheduler_type": kind, "lr_scheduler_kwargs": options}, "optim")
    theirs = {"min_lr_rate": 0.0} if kind.endswith("with_min_lr") else options
    wanted = transformers_rates(kind, 4, 20, theirs)
    assert [schedule(step, settings, 20) for step in range(20)] == pytest.approx(wanted, rel=1e-12, abs=1e-15)
    # A stage's first step has a rate already (its cosine is counted in another way).
    stage = StageConfig(max_steps=20, learning_rate=2.0, warmup_steps=4, min_lr_ratio=0.0, lr_scheduler_type=kind,
                          lr_scheduler_kwargs=options)
    if kind != "cosine":
        assert [learning_rate(step, stage) for step in range(19)] == pytest.approx(wanted[1:], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("kind", "options", "end"), [
    ("cosine", {}, 0.5), ("linear", {}, 0.5), ("polynomial", {}, 0.5), ("polynomial", {"lr_end": 0.1}, 0.1),
    ("cosine_with_restarts", {}, 0.5), ("cosine_with_min_lr", {}, 0.5), ("cosine_with_min_lr", {"min_lr": 0.2}, 0.2),
    ("cosine_warmup_with_min_lr", {}, 0.5144),  # it counts a step ahead
    ("warmup_stable_decay", {"num_decay_steps": 3}, 0.5),
    ("constant_with_warmup", {}, 2.0), ("inverse_sqrt", {}, 2.0 / math.sqrt(5))])
def test_min_lr_ratio_is_where_a_schedule_ends(kind: str, options: dict, end: float) -> None:
    settings = OptimSettings(learning_rate=2.0, warmup_steps=4, min_lr_ratio=0.25, lr_scheduler_type=kind,
                             lr_scheduler_kwargs=options)
    assert schedule(4, settings, 20) == pytest.approx(2.0, rel=0.01)
    assert schedule(20, settings, 20) == pytest.approx(end, rel=1e-4)


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"lr_scheduler_type": "polynomal"}, "did you mean 'polynomial'"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "follows a measured loss"),
    ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"power": 2}}, "takes no lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"powr": 2}}, "'polynomial' with .*powr"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
    ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}}, "'inverse_sqrt' with .*0")])
def test_schedules_that_cannot_be_made_are_one_sentence(settings: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        schedule(19, read_settings(OptimSettings, settings, "optim"), 20)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=sentence):
        StageTask("stage", nn.Linear(2, 2), StageConfig(max_steps=20, warmup_steps=3, **settings))
