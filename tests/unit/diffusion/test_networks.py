"""Denoisers and autoencoders of diffusers folders, by the class in `config.json`."""

import pytest
import torch
from safetensors.torch import save_file
from tiny import read_json, spread, write_json
from tiny.diffusion import DENOISER_SIZES, autoencoder
from tiny.seed import write_code_decoder
from torch import nn
from torch.testing import assert_close

from seed_multimodal.diffusion.networks import (
    DENOISERS,
    conditions_of,
    context_dim,
    denoiser_kind,
    encode_moments,
    pooled_dim,
    predict,
)
from seed_multimodal.errors import CheckpointError
from seed_multimodal.models.seed.diffusion import CodesDetokenizer
from seed_multimodal.training.pixel_decoder.encoders import sample_latents

N_TOKENS = 5


# GLM-Image's has other inputs: tests/unit/glm_image.
@pytest.fixture(params=[name for name in DENOISERS if not name.startswith("Glm")])
def denoiser(request) -> torch.nn.Module:
    import diffusers

    name = request.param
    torch.manual_seed(0)
    sizes = {**DENOISER_SIZES[name], DENOISERS[name].context_dim: 12, "sample_size": 8}
    return getattr(diffusers, name)(**sizes, in_channels=4, out_channels=4).eval()


@torch.no_grad()
def test_predict_reads_latents_steps_and_conditions(denoiser):
    """One step for all rows or one each; every argument changes the prediction."""
    spread(denoiser)
    tokens = torch.randn(2, N_TOKENS, context_dim(denoiser))
    pooled = torch.randn(2, pooled_dim(denoiser)) if pooled_dim(denoiser) else None
    conditions = conditions_of(denoiser, tokens, pooled, torch.zeros(2, 6))
    swapped = conditions_of(denoiser, tokens.flip(0), pooled, torch.zeros(2, 6))
    latents = torch.randn(2, 4, 8, 8)
    step = torch.tensor(300.5)
    prediction = predict(denoiser, latents, step, conditions)
    assert prediction.shape == latents.shape
    each = predict(denoiser, latents, step.expand(2), conditions)
    assert_close(each, prediction)
    others = [
        predict(denoiser, latents, torch.tensor(800.0), conditions),
        predict(denoiser, latents + 1, step, conditions),
        predict(denoiser, latents, step, swapped),
    ]
    for other in others:
        assert (other - prediction).abs().max() > 1e-3


def test_save_and_load_by_the_class_of_the_config(denoiser, tmp_path):
    # A folder tells its denoiser; a class that is none of ours is named.
    folder = tmp_path / denoiser_kind(denoiser).folder
    denoiser.save_pretrained(folder)
    loaded = CodesDetokenizer.load_part(tmp_path, "denoiser")
    assert type(loaded) is type(denoiser)
    for name, value in denoiser.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)

    # A half of a deeper network would draw noise.
    file = folder / "diffusion_pytorch_model.safetensors"
    lists = [name for name, part in denoiser.named_modules() if isinstance(part, nn.ModuleList)]
    further = f"{lists[0]}.9.weight"
    save_file({**denoiser.state_dict(), further: torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=further):
        CodesDetokenizer.load_part(tmp_path, "denoiser")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "_class_name": "Transformer2DModel"})
    with pytest.raises(CheckpointError, match="Transformer2DModel"):
        CodesDetokenizer.load_part(tmp_path, "denoiser")


@pytest.mark.parametrize("name, channels", [("kl", 4), ("kl16", 16), ("dc", 32), ("tiny", 4)])
@torch.no_grad()
def test_latents_of_autoencoders(name, channels, tmp_path):
    """Scaled and shifted as in diffusers' pipelines, and back."""
    vae = autoencoder(name).eval()
    moments = encode_moments(vae, torch.rand(1, 3, 16, 16) * 2 - 1)
    assert moments.shape == (1, 2 * channels, 8, 8)
    mean = moments[:, :channels]
    scale = vae.config.scaling_factor
    shift = vae.config.get("shift_factor") or 0.0
    latents = (mean - shift) * scale
    if name in ("dc", "tiny"):  # without a variance
        sampled = sample_latents(vae, moments, torch.Generator())
        assert_close(sampled, latents, atol=1e-5, rtol=1e-5)
    detokenizer = CodesDetokenizer.from_pretrained(write_code_decoder(tmp_path / "decoder"))
    detokenizer.vae = vae
    decoded = detokenizer.decode(latents)
    expected = (vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
    assert_close(decoded, expected, atol=1e-4, rtol=1e-4)
    if name != "tiny":  # GroupNorm is less exact for channels last
        exact = vae.decode(latents / scale + shift).sample
        assert torch.equal(decoded, (exact * 0.5 + 0.5).clamp(0, 1))
