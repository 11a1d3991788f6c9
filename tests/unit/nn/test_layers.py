"""Layers of bfloat16 weights on CPUs without bfloat16 instructions, and attention."""

import copy

import pytest
import torch
from torch import nn

from seed_multimodal.nn import layers
from seed_multimodal.nn.layers import FEW_KEYS, FEW_ROWS, avoid_slow_bfloat16, scaled_dot_product

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


@pytest.mark.parametrize("n_keys", [16, FEW_KEYS, FEW_KEYS + 1])
@pytest.mark.parametrize("mask", ["none", "causal", "keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_gradients_are_those_of_the_formula(n_keys, mask, dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n_keys, 8).to(dtype).requires_grad_() for _ in "qkv")
    allowed = torch.ones(n_keys, n_keys, dtype=torch.bool)
    options = {}
    if mask == "causal":
        allowed = allowed.tril()
        options = {"is_causal": True}
    elif mask == "keys":
        allowed[:, n_keys // 2 :] = False
        options = {"attn_mask": allowed}
    with torch.no_grad():
        untracked = scaled_dot_product(query, key, value, **options)
    output = scaled_dot_product(query, key, value, **options)
    # The fused kernel's backward is slow for few keys.
    is_fused = "Flash" in output.grad_fn.name()
    assert not (dtype == torch.bfloat16 and n_keys <= FEW_KEYS and is_fused)

    wide = [x.detach().float().requires_grad_() for x in (query, key, value)]
    scores = (wide[0] @ wide[1].mT / 8**0.5).masked_fill(~allowed, -torch.inf)
    expected = scores.softmax(-1) @ wide[2]
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((output.float() * weights).sum(), (query, key, value))
    right = torch.autograd.grad((expected * weights).sum(), wide)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for ours, theirs in zip(
        (output, untracked, *gradients), (expected, expected, *right), strict=True
    ):
        assert torch.allclose(ours.float(), theirs, rtol=tolerance, atol=tolerance)
