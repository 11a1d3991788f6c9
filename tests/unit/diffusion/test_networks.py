"""Denoisers and autoencoders of diffusers folders, by the class in `config.json`."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from tiny.diffusion import DENOISER_SIZES, autoencoder
from tiny.seed import write_code_decoder

from seed_multimodal.diffusion.networks import (
    DENOISERS,
    compile_blocks,
    conditions_of,
    context_dim,
    denoiser_kind,
    encode_moments,
    pooled_dim,
    predict,
    size_unit,
)
from seed_multimodal.diffusion.training import train_unet
from seed_multimodal.errors import CheckpointError
from seed_multimodal.models.seed.diffusion import CodesDetokenizer
from seed_multimodal.training.pixel_decoder.task import sample_latents

N_TOKENS = 5


@pytest.fixture(params=DENOISERS)
def denoiser(request) -> torch.nn.Module:
    name = request.param
    torch.manual_seed(0)
    sizes = {**DENOISER_SIZES[name], DENOISERS[name].context_dim: 12, "sample_size": 8}
    return getattr(diffusers, name)(**sizes, in_channels=4, out_channels=4).eval()


@torch.no_grad()
def test_predict_reads_latents_steps_and_conditions(denoiser):
    """One step for all rows or one each; every argument changes the prediction."""
    for parameter in denoiser.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randn(2, N_TOKENS, context_dim(denoiser))
    pooled = torch.randn(2, pooled_dim(denoiser)) if pooled_dim(denoiser) else None
    conditions = conditions_of(denoiser, tokens, pooled, torch.zeros(2, 6))
    swapped = conditions_of(denoiser, tokens.flip(0), pooled, torch.zeros(2, 6))
    latents = torch.randn(2, 4, 8, 8)
    step = torch.tensor(300.5)
    prediction = predict(denoiser, latents, step, conditions)
    assert prediction.shape == latents.shape
    each = predict(denoiser, latents, step.expand(2), conditions)
    torch.testing.assert_close(each, prediction)
    others = [
        predict(denoiser, latents, torch.tensor(800.0), conditions),
        predict(denoiser, latents + 1, step, conditions),
        predict(denoiser, latents, step, swapped),
    ]
    assert all((other - prediction).abs().max() > 1e-3 for other in others)


@torch.no_grad()
def test_predict_of_a_class_that_is_only_a_row(monkeypatch):
    """PixArt has no scale of time steps, and learns a variance."""
    row = denoiser_kind(diffusers.SanaTransformer2DModel(num_layers=0))
    monkeypatch.setitem(DENOISERS, "PixArtTransformer2DModel", row)
    torch.manual_seed(0)
    denoiser = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        sample_size=8,
        caption_channels=12,
        use_additional_conditions=False,
    ).eval()
    latents = torch.randn(2, 4, 8, 8)
    step = torch.tensor(300)
    conditions = conditions_of(denoiser, torch.randn(2, N_TOKENS, 12), None, torch.zeros(2, 6))
    expected = denoiser(latents, timestep=step.expand(2), **conditions).sample[:, :4]
    torch.testing.assert_close(predict(denoiser, latents, step, conditions), expected)


def test_train_unet_of_keys_and_values(denoiser):
    """Of Stable Diffusion 3 also those of the conditions."""
    train_unet(denoiser, "key_value")
    trained = [name for name, value in denoiser.named_parameters() if value.requires_grad]
    layers = {name.split(".")[-2] for name in trained}
    expected = {"to_k", "to_v"}
    if isinstance(denoiser, diffusers.SD3Transformer2DModel):
        expected |= {"add_k_proj", "add_v_proj"}
    assert layers == expected


@pytest.mark.parametrize("name", ["DDIMSchedulr", "UNet2DConditionModel", None])
def test_load_an_unknown_scheduler(name, tmp_path):
    (tmp_path / "scheduler").mkdir()
    config = json.dumps({"_class_name": name})
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(config)
    with pytest.raises(CheckpointError, match=f"_class_name is '{name}'.* no scheduler of diff"):
        CodesDetokenizer.load_part(tmp_path, "scheduler")


def test_save_and_load_by_the_class_of_the_config(denoiser, tmp_path):
    folder = tmp_path / denoiser_kind(denoiser).folder
    denoiser.save_pretrained(folder)
    loaded = CodesDetokenizer.load_part(tmp_path, "denoiser")
    assert type(loaded) is type(denoiser)
    for name, value in denoiser.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    with pytest.raises(CheckpointError, match="_class_name is 'Transformer2DModel'"):
        CodesDetokenizer.load_part(tmp_path, "denoiser")


def test_compile_blocks(denoiser):
    compile_blocks(denoiser)
    assert any(module._compiled_call_impl is not None for module in denoiser.modules())


@pytest.mark.parametrize(("name", "channels"), [("kl", 4), ("kl16", 16), ("dc", 32)])
@torch.no_grad()
def test_latents_of_autoencoders(name, channels, tmp_path: Path):
    """Scaled and shifted as in diffusers' pipelines, and back."""
    vae = autoencoder(name).eval()
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    moments = encode_moments(vae, pixels)
    assert moments.shape == (1, 2 * channels, 8, 8)
    shift = vae.config.get("shift_factor") or 0.0
    latents = sample_latents(
        moments, vae.config.scaling_factor, torch.Generator().manual_seed(0), shift
    )
    mean = moments[:, :channels]
    if name == "dc":
        torch.testing.assert_close(latents, mean * vae.config.scaling_factor, atol=1e-5, rtol=1e-5)
    decoder = write_code_decoder(tmp_path / "decoder")
    detokenizer = CodesDetokenizer.from_pretrained(decoder)
    detokenizer.vae = vae
    decoded = detokenizer.decode((mean - shift) * vae.config.scaling_factor)
    expected = (vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=1e-4)


def test_size_unit_is_that_of_latents_and_patches():
    vae = autoencoder("kl")
    sd3 = diffusers.SD3Transformer2DModel(**DENOISER_SIZES["SD3Transformer2DModel"])
    assert size_unit(sd3, vae) == 8
    sana = diffusers.SanaTransformer2DModel(
        **DENOISER_SIZES["SanaTransformer2DModel"], patch_size=8
    )
    assert size_unit(sana, vae) == 16
