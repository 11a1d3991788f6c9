"""Muon and AdamW as one optimiser: who trains what, equal learning rates, a state that resumes exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from seed_multimodal.training.optimizers import MuonWithAdamW


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(torch.relu(self.inner(self.embed(ids))))


def _train(model: nn.Module, optimizer: MuonWithAdamW, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(11, (32,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(ids), (ids * 3 + 1) % 11)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_only_hidden_matrices_go_to_muon() -> None:
    model = Toy()
    optimizer = MuonWithAdamW(model, lr=0.01, weight_decay=0.1)
    muon = [p for group in optimizer.parts["muon"].param_groups for p in group["params"]]
    assert len(muon) == 1 and muon[0] is model.inner.weight
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in everything} == {id(p) for p in model.parameters()} and len(everything) == 4
    bias = next(g for g in optimizer.param_groups if any(p is model.inner.bias for p in g["params"]))
    assert bias["weight_decay"] == 0.0
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    _train(model, optimizer, range(1))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_learns_and_resumes_with_the_same_numbers() -> None:
    torch.manual_seed(0)
    model = Toy()
    optimizer = MuonWithAdamW(model, lr=0.02, weight_decay=0.0)
    first = _train(model, optimizer, range(60))
    assert first[-1] < 0.2 * first[0]
    other = Toy()
    other.load_state_dict(model.state_dict())
    again = MuonWithAdamW(other, lr=0.02, weight_decay=0.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert _train(model, optimizer, range(60, 70)) == _train(other, again, range(60, 70))


def test_another_optimisers_state_is_refused() -> None:
    model = Toy()
    state = torch.optim.AdamW(model.parameters()).state_dict()
    with pytest.raises(ValueError, match="instead of muon, adamw"):
        MuonWithAdamW(model, lr=0.01, weight_decay=0.0).load_state_dict(state)
