"""Counted operations against `torch.utils.flop_counter`, which watches what really runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from seed_multimodal.tokenizers import flops
from seed_multimodal.tokenizers.seed2 import Seed2Tokenizer
from seed_multimodal.tokenizers.seed2_config import Seed2Config
from seed_multimodal.tokenizers.stage2 import Stage2Model

BATCH = 3


@pytest.fixture(params=[False, True], ids=["image_down", "reverse"])
def config(tiny: Seed2Config, request: pytest.FixtureRequest) -> Seed2Config:
    return dataclasses.replace(tiny, use_qformer_image=request.param, decode_depth=2)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(BATCH, 3, 16, 16)


def test_encode_and_decode(config: Seed2Config, pixels: torch.Tensor) -> None:
    model = Seed2Tokenizer(config).eval().requires_grad_(False)
    # Not every torch counts the fused attention of CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        codes = model.encode(pixels)
    assert counter.get_total_flops() == BATCH * flops.encode_flops(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.decode(codes)
    assert counter.get_total_flops() == BATCH * flops.decode_flops(config)


@pytest.mark.parametrize("recon_s", [True, False])
def test_stage_2_step(config: Seed2Config, pixels: torch.Tensor, recon_s: bool) -> None:
    model = Stage2Model(dataclasses.replace(config, recon_s=recon_s))
    # Fused attention computes its scores again on the way back, which is no part of the model.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(pixels, torch.randn(BATCH, 10)).loss.backward()
    assert counter.get_total_flops() == BATCH * flops.stage2_flops(model.config)


def test_released_size() -> None:
    assert flops.encode_flops(Seed2Config()) == pytest.approx(533e9, rel=0.01)
    assert flops.vision_flops(Seed2Config().vit) > 0.97 * flops.encode_flops(Seed2Config())
