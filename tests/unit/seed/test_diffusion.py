"""SEED's de-tokenizers against the pipelines of diffusers.

Negatives, noise level, layout, safety checker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_seed1
import tiny_system
import torch
from torch import Tensor

from seed_multimodal.errors import SeedWarning
from seed_multimodal.models.seed.diffusion import (
    StableDiffusionDetokenizer,
    StableDiffusionSettings,
    UnclipDetokenizer,
)

N = tiny_seed1.TEXT_TOKENS
W = tiny_seed1.TEXT_WIDTH
E = tiny_system.EMBEDDING


def draw(model: Any, embeds: Tensor, **options: Any) -> np.ndarray:
    images = model(embeds, **{"num_inference_steps": 3, "seeds": [5] * len(embeds), **options})
    return np.stack([np.asarray(image, dtype=np.int32) for image in images])


def expected(stock: Any, **options: Any) -> np.ndarray:
    stock.set_progress_bar_config(disable=True)
    images = stock(
        **{"num_inference_steps": 3, "generator": torch.Generator().manual_seed(5), **options}
    ).images
    return np.stack([np.asarray(image, dtype=np.int32) for image in images])


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    return tiny_seed1.diffusion_folder(tmp_path_factory.mktemp("sd") / "sd")


@pytest.fixture(scope="module")
def unclip(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("unclip") / "unclip"
    tiny_system.write_detokenizer(folder)
    return folder


@pytest.fixture
def embeds() -> Tensor:
    return 3 * torch.randn(4, N, W, generator=torch.Generator().manual_seed(3))


def test_stable_diffusion_equals_the_diffusers_pipeline(sd: Path, embeds: Tensor):
    """The empty prompt is the unconditional half; 50 steps and guidance 7.5 are the defaults."""
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(
        str(sd), safety_checker=None, feature_extractor=None
    )
    model = StableDiffusionDetokenizer.from_pretrained(sd)
    assert model.defaults == StableDiffusionSettings(50, 7.5)
    for options in ({}, {"guidance_scale": 1.0}, {"height": 24, "width": 16}):
        assert np.array_equal(
            draw(model, embeds[:1], **options), expected(stock, prompt_embeds=embeds[:1], **options)
        )
    with_negatives = draw(model, embeds[:1], negative_embeds=embeds[2:3])
    assert np.array_equal(
        with_negatives,
        expected(stock, prompt_embeds=embeds[:1], negative_prompt_embeds=embeds[2:3]),
    )


def test_stable_diffusion_with_and_without_safety_checker(tmp_path, embeds: Tensor):
    folder = tiny_seed1.diffusion_folder(tmp_path / "checked", checker=True)
    with pytest.warns(SeedWarning, match="made 1 of 1 images black"):
        assert not draw(StableDiffusionDetokenizer.from_pretrained(folder), embeds[:1]).any()
    assert draw(
        StableDiffusionDetokenizer.from_pretrained(folder, safety_checker=False), embeds[:1]
    ).any()


def test_unclip_equals_the_diffusers_pipeline(unclip: Path):
    from diffusers import StableUnCLIPImg2ImgPipeline

    stock = StableUnCLIPImg2ImgPipeline.from_pretrained(
        str(unclip), image_encoder=None, feature_extractor=None, tokenizer=None, text_encoder=None
    )
    stock.image_encoder = stock.unet  # only its dtype is used
    model = UnclipDetokenizer.from_pretrained(unclip)
    embeds = torch.randn(1, E)
    model.conditioner = None
    zeros = torch.zeros(1, 1, tiny_system.CROSS)
    for options in (
        {"guidance_scale": 1.0},
        {"guidance_scale": 4.0},
        {"guidance_scale": 4.0, "noise_level": 30},
    ):
        assert np.array_equal(
            draw(model, embeds, **options),
            expected(
                stock,
                image_embeds=embeds,
                prompt_embeds=zeros,
                negative_prompt_embeds=zeros,
                **options,
            ),
        )


def test_unclip_with_negatives_or_noise_level(unclip: Path):
    model = UnclipDetokenizer.from_pretrained(unclip)
    embeds = 3 * torch.randn(3, E)
    plain = draw(model, embeds[:2])
    with_negatives = draw(model, embeds[:2], negative_embeds=embeds[2:])
    assert np.array_equal(with_negatives, draw(model, embeds[:2], negative_embeds=embeds[[2, 2]]))
    assert not np.array_equal(plain, with_negatives)
    assert not np.array_equal(plain, draw(model, embeds[:2], noise_level=900))


def test_unclip_with_layout(unclip: Path):
    """The layout conditions the U-Net and gives the start of the denoising."""
    model = UnclipDetokenizer.from_pretrained(unclip)
    embeds = torch.randn(2, E)
    calls: list[tuple[Tensor, Tensor]] = []
    hook = model.unet.register_forward_pre_hook(
        lambda module, args, named: calls.append((args[0], named["encoder_hidden_states"])),
        with_kwargs=True,
    )
    model(embeds, seeds=[1, 2], num_inference_steps=2)
    hook.remove()
    latents, tokens = calls[0]
    assert model.conditioner is not None
    with torch.no_grad():
        start = model.conditioner.warm_latents(
            embeds, [torch.Generator().manual_seed(s) for s in (1, 2)], model.scheduler
        )
        torch.testing.assert_close(tokens[2:], model.conditioner.tokens(embeds))
    assert not tokens[:2].any(), "the unconditional half is zero"
    torch.testing.assert_close(latents[:2], start)
