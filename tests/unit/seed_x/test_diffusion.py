"""SdxlDetokenizer: condition images and guidance of batches (the original's loops: golden kind
`seedx_sdxl_adapter`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_images import noise
from tiny.diffusion import FEATURES, PlainTower, random_adapter, write_sdxl
from torch import Tensor

from seed_multimodal.models.seed_x.diffusion import SdxlDetokenizer, SdxlSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> SdxlDetokenizer:
    """Of the second stage."""
    folder = tmp_path_factory.mktemp("seedx")
    write_sdxl(folder / "sdxl")
    random_adapter(2).save_pretrained(folder / "second")
    model = SdxlDetokenizer.from_pretrained(folder / "sdxl", folder / "second")
    model.set_null_embeds(PlainTower(), 16)
    return model


@pytest.fixture
def embeds() -> Tensor:
    return torch.randn(3, 4, FEATURES, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_a_condition_for_each_image_of_a_batch(model, embeds):
    start = torch.randn(1, 4, 8, 8)
    settings = model.check_settings(num_inference_steps=3)

    def latents(embeds: Tensor, images: Any = None) -> Tensor:
        count = len(embeds)
        null_embeds = model.null_embeds.expand(count, -1, -1)
        starts = start.expand(count, -1, -1, -1)
        return model.denoise(settings, [torch.Generator()], embeds, null_embeds, images, starts)

    conditions = [noise(1, (16, 16)), None, noise(2, (16, 16))]
    mixed = latents(embeds, conditions)
    for row, condition in enumerate(conditions):
        alone = latents(embeds[row : row + 1], [condition])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-3, atol=1e-3)
    without = latents(embeds)
    torch.testing.assert_close(mixed[1], without[1], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(mixed[0], without[0], atol=1e-2)


def test_image_guidance_below_1_runs_the_denoiser_once_a_step(model, embeds):
    # Not for three halves of the batch, which would triple the time.
    assert model.defaults == SdxlSettings(50, 7.5, image_guidance_scale=1.5)
    rows: list[int] = []
    hook = model.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    model(embeds[:2], image_guidance_scale=0.5, num_inference_steps=1)
    hook.remove()
    assert rows == [2]
