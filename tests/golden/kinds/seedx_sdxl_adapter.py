"""SEED-X's SDXL adapters: prompt embeddings, training losses and gradients of both stages, pictures of both pipelines.

Where the released code is wrong, ours is checked to be right: keys and values that the optimiser got are trained (they
were not), the widened first convolution keeps its bias (it did not), and 16 embeddings find 16 negative ones
(`embeds16_with_vit_down` failed). `adapter.full_False` gradients of the resampler are compared all the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from runner import assert_close, assert_same, read_json, read_tensors
from torch import Tensor, nn

from seed_multimodal.diffusion.training import denoising_loss
from seed_multimodal.seed_x.adapter import ResamplerSizes, ResamplerXLV2, SDXLAdapter
from seed_multimodal.seed_x.diffusion import SdxlDetokenizer
from seed_multimodal.weights import assign_strictly

KIND = "seedx_sdxl_adapter"
Tensors = dict[str, Tensor]


class Tower(nn.Module):
    """What stands for the vision tower: a convolution, its places as tokens `[B, N, W]`."""

    def __init__(self, weights: Tensors) -> None:
        super().__init__()
        out, channels, size, _ = weights["weight"].shape
        self.conv = nn.Conv2d(channels, out, size, size)
        self.conv.load_state_dict(weights)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.conv(pixels).flatten(2).mT


def _part(weights: Tensors, name: str) -> Tensors:
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def build(sizes: dict[str, Any], weights: Tensors, stage: int) -> SdxlDetokenizer:
    import diffusers

    state = _part(weights, "adapter")
    if stage == 2:
        state |= _part(weights, "latent")
    channels = state["unet.conv_in.weight"].shape[1]
    adapter = SDXLAdapter(diffusers.UNet2DConditionModel.from_config({**sizes["unet"], "in_channels": channels}),
                          ResamplerXLV2(ResamplerSizes(**sizes["resampler"]))).eval()
    assign_strictly(adapter, state, "adapter")
    vae = diffusers.AutoencoderKL.from_config(sizes["vae"]).eval()
    assign_strictly(vae, _part(weights, "vae"), "vae")
    settings = dict(sizes["scheduler"])
    scheduler = getattr(diffusers, settings.pop("cls") + "Scheduler").from_config(settings)
    made = SdxlDetokenizer(adapter, vae, scheduler)
    assert_same(adapter.reads_condition, stage == 2, "stage")
    return made


def check_prompts(model: SdxlDetokenizer, tower: Tower, given: Tensors, want: Tensors) -> None:
    model.set_null_embeds(tower, given["picture"].shape[-1])
    inputs = {"tensor": tower(given["picture"]), "embeds_down": given["embeds_pooled4"],
              "embeds_nodown": given["embeds16"], "embeds": given["embeds16"]}
    for case in sorted({name.split(".")[1] for name in want if name.startswith("get_image_embeds.")}):
        embeds = inputs[case.rsplit("_", 1)[0]]
        away = case.endswith("_neg")
        prompt, pooled = model.prompts(embeds, model.null_embeds if away else None)
        made = {"embeds": prompt[-len(embeds):], "pooled": pooled[-len(embeds):]}
        made |= {"neg_embeds": prompt[:len(embeds)], "neg_pooled": pooled[:len(embeds)]} if away else {}
        recorded = {name for name in want if name.startswith(f"get_image_embeds.{case}.")}
        assert_same({f"get_image_embeds.{case}.{name}" for name in made}, recorded, f"results of {case}")
        for name, value in made.items():
            key = f"get_image_embeds.{case}.{name}"
            assert_close(value, want[key], 1e-5, 1e-4, key)


def check_training(adapter: SDXLAdapter, name: str, meta: dict[str, Any], given: Tensors, want: Tensors) -> None:
    """One step: prediction, loss, which parameters are trained, norms of their gradients."""
    trained = adapter.set_trainable("all" if name == "adapter.full_True" else "key_value")
    chosen = {key for key, value in adapter.named_parameters() if value.requires_grad}
    assert_same(len(trained), len(chosen), f"{name}: parameters given")
    assert_same(sorted(chosen), sorted(meta[f"{name}.optimizer_parameters"]), f"{name}: trained parameters")
    channels = adapter.latent_channels
    noisy = given["noisy_latents_8ch" if adapter.reads_condition else "noisy_latents"]
    adapter.zero_grad()
    with torch.enable_grad():
        made = adapter(noisy[:, :channels], given["timesteps"], given["image_embeds"], given["time_ids"],
                       noisy[:, channels:] if adapter.reads_condition else None)
        loss = denoising_loss(made, given["noise"])
        loss.backward()
    assert_close(made.detach(), want[f"{name}.noise_pred"], 1e-4, 1e-3, f"{name}.noise_pred")
    assert_close(loss.detach(), want[f"{name}.total_loss"], 1e-5, 1e-4, f"{name}.total_loss")
    for key, norm in meta.get(f"{name}.grad_norms", {}).items():
        assert_close(adapter.get_parameter(key).grad.norm(), norm, 1e-5, 2e-3, f"{name}: gradient of {key}")
    assert_same([key for key in chosen if adapter.get_parameter(key).grad is None], [], f"{name}: without gradient")
    adapter.requires_grad_(False)


def check_pictures(model: SdxlDetokenizer, tower: Tower, given: Tensors, want: Tensors) -> None:
    features, start = tower(given["picture"]), given["pipe.init_latents"]
    side = start.shape[-1] * model.factor
    source = Image.fromarray(given["pipe.latent_image_uint8"].numpy())
    for name in (name for name in want if name.startswith("pipe.")):
        _, kind, rest = name.split(".", 2)
        case, what = rest.rsplit(".", 1)
        if (kind == "edit") != model.adapter.reads_condition:
            continue
        options: dict[str, Any] = {"height": side, "width": side, "num_inference_steps": 4}
        embeds = features
        if case == "from_embeds":  # with the released guidance of 7.5
            embeds, options["num_inference_steps"] = given["embeds_pooled4"], 3
        else:
            options["guidance_scale"] = float(case.removeprefix("guidance_")) if case.startswith("guidance_") else 5.0
        made = model.denoise(model.check_settings(**options), [torch.Generator()], embeds, model.null_embeds,
                             [source] if kind == "edit" and case != "no_image" else None, start)
        made = made if what == "latents" else model.decode(made)
        assert_close(made, want[name], 1e-4, 1e-3, name)


@torch.no_grad()
def check(folder: Path) -> None:
    sizes, meta = read_json(folder / "config.json"), read_json(folder / "meta.json")
    weights, given, want = (read_tensors(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    tower = Tower(_part(weights, "encoder.conv"))
    first, second = (build(sizes, weights, stage) for stage in (1, 2))
    check_prompts(first, tower, given, want)
    second.set_null_embeds(tower, given["picture"].shape[-1])
    for model in (first, second):
        check_pictures(model, tower, given, want)
    check_training(first.adapter, "adapter.full_False", meta, given, want)
    check_training(first.adapter, "adapter.full_True", meta, given, want)
    check_training(second.adapter, "latent", meta, given, want)
    bias = first.adapter.unet.conv_in.bias.clone()
    first.adapter.add_condition_channels()
    assert_close(first.adapter.unet.conv_in.weight, want["latent.conv_in_initial"], 0, 0, "latent.conv_in_initial")
    assert_same(first.adapter.unet.config.in_channels, meta["latent.in_channels_config"], "latent.in_channels_config")
    assert_close(first.adapter.unet.conv_in.bias, bias, 0, 0, "the bias, which the released code forgot")
