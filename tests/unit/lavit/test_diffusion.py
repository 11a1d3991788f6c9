"""LavitDetokenizer: the empty text, ratios, sizes, files, safety checker (images of SDXL:
golden kind `lavit_generation`)."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tensors import normal
from tiny import spread
from tiny.diffusion import (
    CROSS,
    END_ID,
    START_ID,
    TEXT_TOKENS,
    TEXT_WIDTH,
    clip_text_encoder,
    write_sd1,
)
from tiny.lavit import (
    CONDITION_TOKENS,
    DECODER,
    EMPTY_TOKENS,
    empty_text,
    write_lavit_diffusion,
)

from seed_multimodal.errors import CheckpointError, ConfigError, SeedWarning
from seed_multimodal.models.lavit.decoder import CodeDecoder
from seed_multimodal.models.lavit.diffusion import (
    EMPTY_TEXT,
    LavitDetokenizer,
    read_empty_text,
)
from seed_multimodal.models.lavit.ratios import RATIOS, ratio_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Both kinds in the original layout: U-Nets in torch files, the checker in one of them."""
    folder = tmp_path_factory.mktemp("LaVIT")
    write_lavit_diffusion(folder / "highres_pixel_decoding", "highres")
    write_lavit_diffusion(folder / "pixel_decoding", "lowres")
    return folder


def load(folder, name="highres_pixel_decoding", **options) -> LavitDetokenizer:
    sizes = {"tokens": CONDITION_TOKENS}
    if name == "pixel_decoding":  # whose U-Net has no pooled embeddings
        sizes |= {"head": "lowres", "prompt_dim": CROSS}
    torch.manual_seed(0)
    decoder = spread(CodeDecoder(dataclasses.replace(DECODER, **sizes)).eval(), 0.5)
    return LavitDetokenizer.from_pretrained(folder / name, decoder, **options)


ROWS = [torch.linspace(-1, 1, 3 * DECODER.code_dim).view(3, -1)]  # of one image


@torch.no_grad()
def test_denoise_of_stable_diffusion_with_the_empty_text(folder):
    # The unconditional half is masked behind the empty text; here both halves in separate calls.
    model = load(folder, "pixel_decoding")
    prompt = model.decoder(ROWS)
    masked = torch.full((1, CONDITION_TOKENS - EMPTY_TOKENS, CROSS), 9.0)
    without = {
        "encoder_hidden_states": torch.cat([empty_text(), masked], 1),
        "encoder_attention_mask": torch.arange(CONDITION_TOKENS)[None] < EMPTY_TOKENS,
    }
    model.scheduler.set_timesteps(3)
    x = normal(5, 4, 8, 8)[None]
    for step in model.scheduler.timesteps:
        plain = model.unet(x, step, **without).sample
        full = model.unet(x, step, encoder_hidden_states=prompt.prompt_embeds).sample
        x = model.scheduler.step(plain + 5 * (full - plain), step, x, eta=0.0).prev_sample
    options = model.check_settings(num_inference_steps=3, guidance_scale=5.0)
    latents = model.denoise(options, [torch.Generator().manual_seed(5)], ROWS)
    torch.testing.assert_close(latents, x, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_denoise_in_half_precision_has_exact_sizes(folder):
    # bf16 would round 1333 to 1336.
    model = load(folder, dtype=torch.bfloat16)
    sizes = []
    model.unet.register_forward_pre_hook(
        lambda module, args, named: sizes.append(named["added_cond_kwargs"]["time_ids"]),
        with_kwargs=True,
    )
    options = model.check_settings(num_inference_steps=1, original_size=(375, 1333))
    latents = model.denoise(options, [torch.Generator()], ROWS)
    assert latents.dtype == torch.float32
    assert sizes[0].tolist() == [[375, 1333, 0, 0, 16, 16]] * 2


def test_ratio_size_of_the_unet(folder):
    # Multiples of eight for smaller networks than the published one.
    small = [ratio_size(name, 64, 8) for name in RATIOS]
    assert small == [(64, 64), (56, 72), (56, 80), (48, 88), (80, 56), (72, 56)]
    with pytest.raises(ConfigError, match="ratio"):
        load(folder).check_settings(ratio="1:3")


def test_read_empty_text_of_a_file_or_the_text_encoder(tmp_path):
    # LaVIT's folder has the file, Stable Diffusion's its text encoder.
    write_sd1(tmp_path)
    empty = torch.tensor([[START_ID, *[END_ID] * (TEXT_TOKENS - 1)]])
    with torch.no_grad():
        expected = clip_text_encoder()(empty).last_hidden_state
    torch.testing.assert_close(read_empty_text(tmp_path, TEXT_WIDTH), expected)
    torch.save(torch.ones(1, 3, 8), tmp_path / EMPTY_TEXT)
    assert torch.equal(read_empty_text(tmp_path, 8), torch.ones(1, 3, 8))
    with pytest.raises(CheckpointError, match="8"):  # of another U-Net's width
        read_empty_text(tmp_path, 9)


def test_call_with_the_safety_checker(folder):
    # A concept near the first image flags it alone, also in half precision.
    model = load(folder, dtype=torch.bfloat16, safety=folder / "pixel_decoding")
    rows = [torch.randn(length, DECODER.code_dim) for length in (3, 5)]

    def draw():
        with torch.autocast("cpu", torch.bfloat16):
            return model(rows, seeds=[1, 2], num_inference_steps=2)

    checked = draw()
    assert all(np.asarray(image).any() for image in checked)
    checker = model.safety_checker
    pixels = model.feature_extractor(checked, return_tensors="pt").pixel_values
    embeds = checker.visual_projection(checker.vision_model(pixels)[1]).detach()
    first, second = torch.nn.functional.normalize(embeds)
    checker.concept_embeds.data[0] = first - second
    checker.concept_embeds_weights.data[0] = 0.0
    with pytest.warns(SeedWarning, match="1 of 2"):
        assert [bool(np.asarray(image).any()) for image in draw()] == [False, True]
