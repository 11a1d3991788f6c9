"""The drawing half of `lavit_generation` fixtures: image words → conditions → latents → pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from runner import assert_close, read_json, read_tensors
from torch import Tensor

from seed_multimodal.lavit.decoder import CodeDecoder, Conditions, Head, LavitDecoderConfig
from seed_multimodal.lavit.diffusion import LavitDetokenizer
from seed_multimodal.weights import assign_strictly

MLP_RATIO = 4.3637  # released; its product with the width is cut to a whole number
FIRST_CODE = 32002
STEPS, GUIDANCE = 4, 7.0
Tensors = dict[str, Tensor]


def decoder_config(sizes: dict[str, Any], features: int, widths: list[int], head: Head) -> LavitDecoderConfig:
    """A fixture's sizes in our words."""
    return LavitDecoderConfig(
        head=head, tokens=(sizes["img_size"] // sizes["patch_size"]) ** 2, code_dim=sizes["in_chans"],
        width=sizes["embed_dim"], depth=sizes["depth"], heads=sizes["num_heads"],
        mlp_width=int(sizes["embed_dim"] * MLP_RATIO), feature_dim=features, prompt_dim=widths[0],
        pooled_dim=widths[1])


def part(weights: Tensors, name: str) -> Tensors:
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def pixel_decoder(config: dict[str, Any], weights: Tensors) -> LavitDetokenizer:
    import diffusers

    unet = diffusers.UNet2DConditionModel.from_config(config["unet"]).eval()
    vae = diffusers.AutoencoderKL.from_config(config["vae"]).eval()
    assign_strictly(unet, part(weights, "unet"), "unet")
    assign_strictly(vae, part(weights, "vae"), "vae")
    return LavitDetokenizer(unet, vae, diffusers.DDIMScheduler.from_config(config["scheduler"]))


def check_latents(model: LavitDetokenizer, made: Conditions, case: dict[str, Any], name: str, want: Tensors) -> None:
    """One case: the recorded noise has a latent for eight pixels, whatever the tiny autoencoder makes of one."""
    start = want[f"{name}.initial_latents"]
    assert start.shape[2:] == (case["height"] // 8, case["width"] // 8), f"{name}: another size of the latents"
    settings = model.check_settings(num_inference_steps=STEPS, guidance_scale=GUIDANCE, **case)
    latents = model.denoise(settings, [torch.Generator()] * len(start), made, start=start)
    assert_close(latents / model.vae.config.scaling_factor, want[f"{name}.vae_input"], 1e-3, 1e-3, f"{name}.vae_input")
    pixels = model.decode(latents).mul(255).round().permute(0, 2, 3, 1)
    assert_close(pixels, want[f"{name}.image_uint8"], 2, 0, f"{name}.image_uint8")


@torch.no_grad()
def check_pixels(folder: Path) -> None:
    """Conditions of the recorded words, and the pictures of every recorded size."""
    config, cases = read_json(folder / "config.json"), read_json(folder / "cases.json")
    weights, want = (read_tensors(folder / f"{name}.safetensors") for name in ("weights", "outputs"))
    sizes = config["decoder"]
    decoder = CodeDecoder(decoder_config(sizes, sizes["decoder_out_dim"], sizes["unet_dims"], "highres")).eval()
    assign_strictly(decoder, part(weights, "decoder"), "decoder")
    codes = [torch.tensor([one - FIRST_CODE for one in words if one >= FIRST_CODE]) for words in cases["image_tokens"]]
    made = decoder([weights["quantize.embedding.weight"][one] for one in codes])
    assert made.pooled is not None
    assert_close(made.prompt_embeds, want["image_embeds.prompt"], 1e-5, 1e-4, "image_embeds.prompt")
    assert_close(made.pooled, want["image_embeds.pooled"], 1e-5, 1e-4, "image_embeds.pooled")
    model = pixel_decoder(config, weights)
    assert cases["decoder_cases"], "the fixture holds no picture"
    for name, case in cases["decoder_cases"].items():
        check_latents(model, made, case, f"pixels.{name}", want)
