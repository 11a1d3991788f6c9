"""Layers of bfloat16 weights on CPUs without bfloat16 instructions."""

import copy

import pytest
import torch
from torch import nn

from seed_multimodal.nn import layers
from seed_multimodal.nn.layers import FEW_ROWS, avoid_slow_bfloat16

LAYERS = {
    "convolution": (nn.Conv2d(8, 16, 3, padding=1), (2, 8, 12, 12)),
    "linear": (nn.Linear(8, 16, bias=False), (2, FEW_ROWS, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_computes_in_float32_and_keeps_bfloat16_weights(monkeypatch, name):
    monkeypatch.setattr(layers, "cpu_computes_bfloat16", lambda: False)
    plain, shape = LAYERS[name]
    layer = copy.deepcopy(plain).bfloat16()
    features = torch.randn(shape).bfloat16()
    in_float32 = copy.deepcopy(layer).float()(features.float())
    model = nn.Sequential(layer)
    avoid_slow_bfloat16(model)
    for network in (model, copy.deepcopy(model)):
        assert torch.equal(network(features), in_float32.bfloat16())
        assert network[0].weight.dtype == torch.bfloat16
    assert torch.equal(model.float()(features.float()), in_float32)
