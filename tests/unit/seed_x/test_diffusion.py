"""SdxlDetokenizer: the pipeline of diffusers, condition images, guidance (original loops: golden
kind `seedx_sdxl_adapter`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_images import noise
from tiny.diffusion import FEATURES, PlainTower, random_adapter, write_sdxl
from torch import Tensor

from seed_multimodal.models.seed_x.diffusion import SdxlDetokenizer, SdxlSettings

W = FEATURES


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("seedx")
    write_sdxl(folder / "sdxl")
    random_adapter(1).save_pretrained(folder / "first")
    random_adapter(2).save_pretrained(folder / "second")
    return folder


def load(folder: Path, stage: str) -> SdxlDetokenizer:
    model = SdxlDetokenizer.from_pretrained(folder / "sdxl", folder / stage)
    model.set_null_embeds(PlainTower(), 16)
    return model


@pytest.fixture
def embeds() -> Tensor:
    return torch.randn(3, 4, W, generator=torch.Generator().manual_seed(3))


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int32) for image in images])


def latents(
    model: SdxlDetokenizer,
    embeds: Tensor,
    start: Tensor,
    images: Any = None,
    negatives: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    with torch.no_grad():
        return model.denoise(
            model.check_settings(**{"num_inference_steps": 3, **settings}),
            [torch.Generator()],
            embeds,
            model.null_embeds if negatives is None else negatives,
            images,
            start,
        )


def test_first_stage_equals_the_diffusers_pipeline(folder: Path, embeds: Tensor):
    """The unconditional half is the embedding of an empty image."""
    from diffusers import StableDiffusionXLPipeline

    model = load(folder, "first")
    stock = StableDiffusionXLPipeline.from_pretrained(
        str(folder / "sdxl"), unet=model.unet, add_watermarker=False
    )
    stock.set_progress_bar_config(disable=True)
    with torch.no_grad():
        prompt, pooled = model.resampler(embeds[:1])
        empty = PlainTower()(torch.zeros(1, 3, 16, 16))
        no_prompt, no_pooled = model.resampler(empty.unflatten(1, (4, 4)).mean(2))
    expected = stock(
        prompt_embeds=prompt,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=no_prompt,
        negative_pooled_prompt_embeds=no_pooled,
        num_inference_steps=5,
        guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(5)],
    ).images
    assert model.defaults == SdxlSettings(50, 7.5, image_guidance_scale=1.5)
    assert (
        np.abs(pixels(model(embeds[:1], seeds=[5], num_inference_steps=5)) - pixels(expected)).max()
        <= 1
    )


def test_second_stage_with_a_condition_for_each_image(folder: Path, embeds: Tensor):
    model = load(folder, "second")
    start = torch.randn(1, 4, 8, 8)
    conditions = [noise(1, (16, 16)), None, noise(2, (16, 16))]
    mixed = latents(
        model, embeds, start.expand(3, -1, -1, -1), conditions, model.null_embeds.expand(3, -1, -1)
    )
    for row, condition in enumerate(conditions):
        alone = latents(model, embeds[row : row + 1], start, [condition])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixed[1:2], latents(model, embeds[1:2], start), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(latents(model, embeds[:1], start), mixed[:1], atol=1e-2)


def test_second_stage_with_image_guidance_below_1(folder: Path, embeds: Tensor):
    second = load(folder, "second")
    rows = list[int]()
    hook = second.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    second(embeds[:2], image_guidance_scale=0.5, num_inference_steps=1)
    hook.remove()
    assert rows == [2], "the U-Net should run once a step"
