"""Counted operations against `torch.utils.flop_counter`, which watches what really runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from seed_multimodal.tokenizers import flops
from seed_multimodal.tokenizers.lavit import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.tokenizers.lavit_decoder import CodeDecoder, LavitDecoderConfig
from seed_multimodal.tokenizers.lavit_training import LavitStage1
from seed_multimodal.tokenizers.seed1 import Seed1Config
from seed_multimodal.tokenizers.seed1_stage2 import Seed1Stage2Model
from seed_multimodal.tokenizers.seed2 import Seed2Config, Seed2Tokenizer
from seed_multimodal.tokenizers.stage1 import Stage1Model
from seed_multimodal.tokenizers.stage2 import Stage2Model
from seed_multimodal.vision.eva import EvaConfig

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


def test_stage_2_with_a_trained_q_former_and_a_tower_that_ran_before(config: Seed2Config, pixels: torch.Tensor) -> None:
    model = Stage2Model(config, freeze_qformer=False)
    features = model.visual_encoder(pixels).detach()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(None, torch.randn(BATCH, 10), vit_features=features).loss.backward()
    rest = flops.stage2_flops(config, freeze_qformer=False) - flops.vision_flops(config.vit)
    assert counter.get_total_flops() == BATCH * rest


@pytest.mark.parametrize("freeze_qformer", [True, False])
def test_stage_2_of_seed_1(tiny: Seed2Config, pixels: torch.Tensor, freeze_qformer: bool) -> None:
    config = Seed1Config(vit=tiny.vit, qformer=tiny.qformer, codebook_size=50, codebook_dim=6, decode_depth=2,
                         reverse_depth=2, text_tokens=7, text_features_dim=10)
    model = Seed1Stage2Model(config, freeze_qformer=freeze_qformer)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(pixels, torch.randn(BATCH, 7, 10)).loss.backward()
    assert counter.get_total_flops() == BATCH * flops.stage2_flops(config, freeze_qformer=freeze_qformer)


@pytest.mark.parametrize(("freeze_vit", "embedding_dim"), [(True, None), (False, 10)])
def test_stage_1_step(tiny: Seed2Config, pixels: torch.Tensor, freeze_vit: bool, embedding_dim: int | None) -> None:
    model = Stage1Model(tiny, vocab_size=30, embed_dim=12, freeze_vit=freeze_vit, embedding_dim=embedding_dim)
    target = None if embedding_dim is None else torch.randn(BATCH, embedding_dim)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(pixels, torch.randint(3, 30, (BATCH, 5)), target_embedding=target).loss.backward()
    assert counter.get_total_flops() == BATCH * flops.stage1_flops(
        tiny, words=5, pairs=BATCH, embed_dim=12, freeze_vit=freeze_vit, embedding_dim=embedding_dim)


def test_released_size() -> None:
    assert flops.encode_flops(Seed2Config()) == pytest.approx(533e9, rel=0.01)
    assert flops.vision_flops(Seed2Config().vit) > 0.97 * flops.encode_flops(Seed2Config())


@pytest.mark.parametrize(("freeze_selector", "close"), [(True, 0), (False, 0.03)])
def test_lavits_stage_1_step(freeze_selector: bool, close: float) -> None:
    """All pictures keep the same patches, so that no row pads; where a decision is tried one keeps more or fewer."""
    batch = 4  # whole shares of `TRIED`
    vit = EvaConfig(image_size=16, patch_size=4, width=16, depth=1, heads=2, mlp_width=24)
    config = LavitTokenizerConfig(vit=vit, vit_head=0, merger_depth=2, merger_heads=2, merger_mlp_width=24,
                                  codebook_size=20, codebook_dim=6, llm_width=8)
    decoder = LavitDecoderConfig(head="lowres", tokens=16, code_dim=6, width=12, depth=2, heads=2, mlp_width=20,
                                 feature_dim=16, prompt_dim=8)
    model = LavitStage1(DynamicTokenizer(config), CodeDecoder(decoder), freeze_selector=freeze_selector)
    if not freeze_selector:  # torch's counter cannot follow a view of a parameter into a module without gradients
        model.decoder.query_embed.requires_grad_(False)
    noise = torch.zeros(batch, 16, 2)
    noise[:, :6, 0], noise[:, 6:, 1] = 100.0, 100.0
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = model(torch.randn(batch, 3, 16, 16), noise=noise)
        out.loss.backward()
    expected = batch * flops.lavit_stage1_flops(config, decoder, 6 / 16, freeze_selector)
    assert counter.get_total_flops() == pytest.approx(expected, rel=close, abs=0)
