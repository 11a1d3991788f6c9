"""SEED's de-tokenizers: sizes, negatives, safety checker, layout (images as recorded: golden
`seed1_sd_decode`, `seed2_unclip_decode`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny.diffusion import EMBEDDING, TEXT_TOKENS, TEXT_WIDTH, write_sd1, write_unclip
from torch import Tensor

from seed_multimodal.errors import SeedWarning
from seed_multimodal.models.seed.diffusion import (
    StableDiffusionDetokenizer,
    StableDiffusionSettings,
    UnclipDetokenizer,
)


def pixels(images: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int32) for image in images])


def draw(model: Any, embeds: Tensor, **options: Any) -> np.ndarray:
    return pixels(model(embeds, seeds=[5] * len(embeds), num_inference_steps=3, **options))


def expected(stock: Any, **options: Any) -> np.ndarray:
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return pixels(stock(num_inference_steps=3, generator=generator, **options).images)


@pytest.fixture(scope="module")
def unclip(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("unclip") / "unclip"
    write_unclip(folder)
    return folder


@pytest.fixture
def embeds() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 3 * torch.randn(4, TEXT_TOKENS, TEXT_WIDTH, generator=generator)


def test_stable_diffusion_equals_the_diffusers_pipeline(folder, embeds):
    # With sizes and negatives, which the original does not have.
    from diffusers import StableDiffusionPipeline

    sd1 = folder / "stable-diffusion-v1-4"
    stock = StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    model = StableDiffusionDetokenizer.from_pretrained(sd1)
    assert model.defaults == StableDiffusionSettings(50, 7.5)
    prompt = embeds[:1]
    negative = embeds[2:3]
    sizes = {"height": 24, "width": 16}
    wanted = expected(stock, prompt_embeds=prompt, negative_prompt_embeds=negative, **sizes)
    assert np.array_equal(draw(model, prompt, negative_embeds=negative, **sizes), wanted)


def test_stable_diffusion_with_and_without_safety_checker(tmp_path, embeds):
    # This checker flags every image.
    folder = write_sd1(tmp_path / "checked", checker=True)
    with pytest.warns(SeedWarning, match="made 1 of 1 images black"):
        assert not draw(StableDiffusionDetokenizer.from_pretrained(folder), embeds[:1]).any()
    unchecked = StableDiffusionDetokenizer.from_pretrained(folder, safety_checker=False)
    assert draw(unchecked, embeds[:1]).any()


def test_unclip_with_layout(unclip):
    # The layout conditions the U-Net and gives the start of the denoising.
    model = UnclipDetokenizer.from_pretrained(unclip)
    embeds = torch.randn(2, EMBEDDING)
    calls: list[tuple[Tensor, Tensor]] = []
    hook = model.unet.register_forward_pre_hook(
        lambda module, args, named: calls.append((args[0], named["encoder_hidden_states"])),
        with_kwargs=True,
    )
    model(embeds, seeds=[1, 2], num_inference_steps=2)
    hook.remove()
    latents, tokens = calls[0]
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    with torch.no_grad():
        start = model.conditioner.warm_latents(embeds, generators, model.scheduler)
        torch.testing.assert_close(tokens[2:], model.conditioner.tokens(embeds))
    assert not tokens[:2].any(), "the unconditional half is zero"
    torch.testing.assert_close(latents[:2], start)
