"""LavitDetokenizer: both kinds of U-Net against a denoising loop of the test, ratios, sizes, files,
safety checker.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny.diffusion import CROSS, POOLED, TEXT_TOKENS, TEXT_WIDTH, clip_text_encoder, write_sd1
from tiny.lavit import CONDITION_TOKENS, EMPTY_TOKENS, empty_text, lavit_unet, write_lavit_diffusion
from torch import Tensor

from seed_multimodal.errors import CheckpointError, ConfigError, SeedWarning
from seed_multimodal.models.lavit.decoder import CodeDecoder, Conditions, LavitDecoderConfig
from seed_multimodal.models.lavit.diffusion import (
    EMPTY_TEXT,
    LavitDetokenizer,
    LavitSettings,
    read_empty_text,
)
from seed_multimodal.models.lavit.ratios import RATIOS, ratio_size

N = CONDITION_TOKENS
WIDTH = CROSS
EMPTY = EMPTY_TOKENS


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """Folders of both kinds in the original layout: U-Nets in torch files, the checker in one of
    them.
    """
    model_dir = tmp_path_factory.mktemp("LaVIT")
    write_lavit_diffusion(model_dir / "highres_pixel_decoding", "highres")
    write_lavit_diffusion(model_dir / "pixel_decoding", "lowres")
    return model_dir


@pytest.fixture(scope="module")
def high(model_dir: Path) -> LavitDetokenizer:
    return LavitDetokenizer.from_pretrained(model_dir / "highres_pixel_decoding", decoder())


def decoder() -> CodeDecoder:
    return CodeDecoder(
        LavitDecoderConfig(
            tokens=N,
            code_dim=4,
            width=8,
            depth=1,
            heads=2,
            mlp_width=8,
            feature_dim=8,
            prompt_dim=WIDTH - POOLED,
            pooled_dim=POOLED,
        )
    ).eval()


def conditions(count: int, pooled: bool = True) -> Conditions:
    generator = torch.Generator().manual_seed(3)
    return Conditions(
        torch.randn(count, N, WIDTH, generator=generator),
        torch.randn(count, POOLED, generator=generator) if pooled else None,
    )


def latents(model: LavitDetokenizer, prompt: Conditions, *seeds: int, **settings: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        return model.denoise(
            model.check_settings(**{"num_inference_steps": 3, **settings}), generators, prompt
        )


def expected(
    model: LavitDetokenizer,
    seed: int,
    size: tuple[int, int],
    conditional: dict[str, Any],
    unconditional: dict[str, Any],
    steps: int,
    guidance: float,
) -> Tensor:
    """Both halves of the guidance in separate calls, from noise of the CPU's generator."""
    model.scheduler.set_timesteps(steps)
    x = torch.randn(4, *size, generator=torch.Generator().manual_seed(seed))[None]
    for step in model.scheduler.timesteps:
        plain, full = (
            model.unet(x, step, **inputs).sample for inputs in (unconditional, conditional)
        )
        x = model.scheduler.step(plain + guidance * (full - plain), step, x, eta=0.0).prev_sample
    return x


@torch.no_grad()
def test_denoise_of_sdxl_with_sizes(high: LavitDetokenizer):
    """The unconditional half is zero."""
    prompt = conditions(1)
    ids = torch.tensor([[40.0, 30, 2, 4, 16, 24]])
    conditional = {
        "encoder_hidden_states": prompt.prompt_embeds,
        "added_cond_kwargs": {"text_embeds": prompt.pooled, "time_ids": ids},
    }
    unconditional = {
        "encoder_hidden_states": torch.zeros(1, N, WIDTH),
        "added_cond_kwargs": {"text_embeds": torch.zeros(1, POOLED), "time_ids": ids},
    }
    assert high.defaults == LavitSettings(25, 7.0)
    sizes: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 5}
    drawn = latents(high, prompt, 5, original_size=(40, 30), crops_coords_top_left=(2, 4), **sizes)
    wanted = expected(high, 5, (8, 12), conditional, unconditional, 5, 7.0)
    torch.testing.assert_close(drawn, wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(latents(high, prompt, 5, **sizes), drawn, atol=1e-3)


@torch.no_grad()
def test_denoise_of_stable_diffusion_with_the_empty_text(model_dir: Path):
    """The unconditional prompt is masked behind the empty text's embeddings."""
    low = LavitDetokenizer.from_pretrained(model_dir / "pixel_decoding")
    prompt = conditions(1, pooled=False)
    rest = torch.full((1, N - EMPTY, WIDTH), 9.0)
    unconditional = {
        "encoder_hidden_states": torch.cat([empty_text(), rest], 1),
        "encoder_attention_mask": torch.arange(N)[None] < EMPTY,
    }
    wanted = expected(
        low, 6, (8, 8), {"encoder_hidden_states": prompt.prompt_embeds}, unconditional, 3, 5.0
    )
    torch.testing.assert_close(
        latents(low, prompt, 6, guidance_scale=5.0), wanted, rtol=1e-3, atol=1e-3
    )


def test_ratio_size_of_the_unet(high: LavitDetokenizer):
    assert len(RATIOS) == 6 and all(side % 64 == 0 for size in RATIOS.values() for side in size)
    full = LavitDetokenizer(lavit_unet("highres", sample_size=512), high.vae, high.scheduler)
    assert {name: full.ratio_size(name) for name in RATIOS} == RATIOS
    assert high.ratio_size("16:9") == (16, 24)  # of 16 pixels: 12 x 21
    small = [ratio_size(name, 64, 8) for name in RATIOS]
    assert small == [(64, 64), (56, 72), (56, 80), (48, 88), (80, 56), (72, 56)]
    assert ratio_size("3:2", 512, 8) == (416, 608)  # of the published size half
    for sizes, drawn in (({}, (24, 16)), ({"height": 32, "width": 16}, (16, 32))):
        assert (
            high([torch.randn(3, 4)], ratio="16:9", num_inference_steps=1, **sizes)[0].size == drawn
        )
    with pytest.raises(ConfigError, match="ratio must be one of 1:1, 4:3, 3:2"):
        high.check_settings(ratio="1:3")


def test_denoise_in_half_precision_has_exact_sizes(model_dir: Path):
    model = LavitDetokenizer.from_pretrained(
        model_dir / "highres_pixel_decoding", dtype=torch.bfloat16
    )
    size_conditions: list[Tensor] = []
    model.unet.register_forward_pre_hook(
        lambda module, args, named: size_conditions.append(named["added_cond_kwargs"]["time_ids"]),
        with_kwargs=True,
    )
    assert latents(model, conditions(1), 1, original_size=(375, 1333)).dtype == torch.float32
    assert size_conditions[0].tolist() == [[375, 1333, 0, 0, 16, 16]] * 2


def test_from_pretrained_with_parts_of_another_width(model_dir: Path, tmp_path):
    shutil.copytree(model_dir / "pixel_decoding", tmp_path / "low")
    torch.save(torch.zeros(1, 3, WIDTH + 1), tmp_path / "low" / EMPTY_TEXT)
    with pytest.raises(CheckpointError, match="has width 17, but the U-Net reads width 16"):
        LavitDetokenizer.from_pretrained(tmp_path / "low")


def test_read_empty_text_of_a_file_or_the_text_encoder(tmp_path):
    with pytest.raises(CheckpointError, match=f"contains no {EMPTY_TEXT}; seed fetch lavit"):
        read_empty_text(tmp_path, TEXT_WIDTH)
    write_sd1(tmp_path)
    empty = torch.tensor([[2, *[3] * (TEXT_TOKENS - 1)]])
    with torch.no_grad():
        wanted = clip_text_encoder()(empty).last_hidden_state
    torch.testing.assert_close(read_empty_text(tmp_path, TEXT_WIDTH), wanted)
    torch.save(torch.ones(1, 3, 8), tmp_path / EMPTY_TEXT)
    assert torch.equal(read_empty_text(tmp_path, 8), torch.ones(1, 3, 8))


def test_call_with_the_safety_checker(model_dir: Path):
    model = LavitDetokenizer.from_pretrained(
        model_dir / "highres_pixel_decoding",
        decoder(),
        dtype=torch.bfloat16,
        safety=model_dir / "pixel_decoding",
    )
    rows = [torch.randn(3, 4), torch.randn(5, 4)]

    def draw() -> list[Any]:
        with torch.autocast("cpu", torch.bfloat16):
            return model(rows, seeds=[1, 2], num_inference_steps=2)

    checked = draw()
    assert all(np.asarray(image).any() for image in checked)
    checker = model.safety_checker
    pixels = model.feature_extractor(checked, return_tensors="pt").pixel_values
    first, second = torch.nn.functional.normalize(
        checker.visual_projection(checker.vision_model(pixels)[1])
    ).detach()
    checker.concept_embeds.data[0] = first - second  # flags the first image
    checker.concept_embeds_weights.data[0] = 0.0
    with pytest.warns(SeedWarning, match="made 1 of 2 images black"):
        assert [bool(np.asarray(image).any()) for image in draw()] == [False, True]
    with pytest.warns(
        SeedWarning, match="holds no safety checker, so images are drawn without one"
    ):
        LavitDetokenizer.from_pretrained(
            model_dir / "highres_pixel_decoding", safety=model_dir / "a"
        )
