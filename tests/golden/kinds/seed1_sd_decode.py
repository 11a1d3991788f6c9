"""SEED-1's drawing: noise schedule, PLMS steps, latents, images and the grid.

The recorded starting noise is used, since what a process draws depends on its device and history. Where the number of
steps divides 1000 the folder's own sampler is checked too; else its time steps are not CompVis'. Not checked:
`pred_x0` (`x_prev` follows from it), what the original refuses (3 or 9 steps, two embeddings a call: both work here),
the watermark.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runner import assert_close, assert_same, read_json, read_tensors
from seed2_common import Tensors

from seed_multimodal.seed.diffusion import StableDiffusionDetokenizer
from seed_multimodal.weights import assign_strictly

KIND = "seed1_sd_decode"
TEXT = "cond_stage_model.transformer."


def _named(prefix: str, weights: Tensors, names: dict[str, str], own: Tensors) -> Tensors:
    """Tensors under diffusers' names; the VAE's attention is stored as 1x1 convolutions."""
    found = {name.removeprefix(prefix): weights[key] for name, key in names.items() if name.startswith(prefix)}
    return {name: value.reshape(own[name].shape) if name in own and value.numel() == own[name].numel() else value
            for name, value in found.items()}


def _tokenizer(sizes: dict[str, Any]) -> Any:
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(sizes["tokenizer_vocab"]))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=sizes["text_length"])


def _text_encoder(settings: dict[str, Any], weights: Tensors) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig(**settings)).eval()
    state = {key.removeprefix(TEXT): value for key, value in weights.items() if key.startswith(TEXT)}
    if not any(key.startswith("text_model.") for key in model.state_dict()):  # transformers 5 dropped the prefix
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
    assign_strictly(model, state, "text_encoder", allow_unexpected=["*position_ids"])
    return model


def build(sizes: dict[str, Any], weights: Tensors, names: dict[str, str]) -> StableDiffusionDetokenizer:
    import diffusers

    unet = diffusers.UNet2DConditionModel.from_config(sizes["diffusers"]["unet"]).eval()
    vae = diffusers.AutoencoderKL.from_config(sizes["diffusers"]["vae"]).eval()
    assign_strictly(unet, _named("unet.", weights, names, unet.state_dict()), "unet")
    assign_strictly(vae, _named("vae.", weights, names, vae.state_dict()), "vae",
                    allow_missing=["encoder.*", "quant_conv.*"])
    settings = dict(sizes["diffusers"]["scheduler"])
    scheduler = getattr(diffusers, settings.pop("_class")).from_config(settings)
    return StableDiffusionDetokenizer(unet, vae, scheduler, tokenizer=_tokenizer(sizes),
                                      text_encoder=_text_encoder(sizes["text_encoder"], weights))


def plms(config: Any, steps: list[int]) -> Any:
    """The folder's sampler at the time steps of the CompVis program, the second of which is done twice."""
    from diffusers import PNDMScheduler

    class Plms(PNDMScheduler):
        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            super().set_timesteps(num_inference_steps, device)
            self._timesteps = np.array(steps[::-1])
            self.timesteps = torch.tensor([steps[0], steps[1], *steps[1:]])

    return Plms.from_config(config)


@contextmanager
def watched(model: StableDiffusionDetokenizer, scheduler: Any):
    """Time steps and inputs of the U-Net's calls, and the guided prediction and result of each sampler step."""
    seen: dict[str, list[Any]] = {"timesteps": [], "shapes": [], "context": [], "eps": [], "x_prev": []}
    step = scheduler.step

    def note(_module: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
        seen["shapes"].append(list(arguments[0].shape))
        seen["timesteps"].append(int(arguments[1]))
        seen["context"].append(keywords["encoder_hidden_states"])

    def stepped(prediction: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        result = step(prediction, *arguments, **keywords)
        seen["eps"].append(prediction)
        seen["x_prev"].append(result[0])
        return result

    handle, scheduler.step = model.unet.register_forward_pre_hook(note, with_kwargs=True), stepped
    try:
        yield seen
    finally:
        handle.remove()
        scheduler.step = step


def check_parts(model: StableDiffusionDetokenizer, given: Tensors, want: Tensors) -> None:
    assert_close(model.scheduler.betas, want["schedule.betas"], 1e-9, 1e-5, "betas")
    assert_close(model.scheduler.alphas_cumprod, want["schedule.alphas_cumprod"], 1e-7, 1e-5, "alphas_cumprod")
    output = model.unet(want["unet.x"], want["unet.t"], encoder_hidden_states=want["unet.context"]).sample
    assert_close(output, want["unet.out"], 1e-5, 1e-4, "unet.out")
    raw = model.vae.decode(want["default.latents"][:1] / model.vae.config.scaling_factor).sample
    assert_close(raw, want["vae.raw"], 2e-4, 1e-4, "vae.raw")
    assert_close(given["text_features"], want["unet.context"][1:], 0, 0, "the conditional half")


def check_case(model: StableDiffusionDetokenizer, case: str, record: dict[str, Any], given: Tensors,
               want: Tensors) -> None:
    start, usual, times = given[f"{case}.x_T"], model.scheduler, record["timesteps"]
    embeds = given["text_features"].expand(len(start), -1, -1)
    settings = model.check_settings(num_inference_steps=record["steps_requested"], guidance_scale=record["scale"])
    model.scheduler = scheduler = plms(usual.config, times)
    with watched(model, scheduler) as seen:
        latents = model.denoise(settings, [], embeds, start=start)
    model.scheduler = usual
    images = model.decode(latents).permute(0, 2, 3, 1).numpy()
    assert_same(seen["timesteps"], [times[0], times[1], *times[1:]], f"{case}: time steps of the U-Net's calls")
    if isinstance(record["unet_calls"], list):
        calls = [[shape, time] for shape, time in zip(seen["shapes"], seen["timesteps"], strict=True)]
        assert_same(calls, record["unet_calls"], f"{case}: calls of the U-Net")
    else:
        assert_same(len(seen["timesteps"]), record["unet_calls"], f"{case}: number of calls of the U-Net")
    if f"{case}.uncond" in want:
        assert_close(seen["context"][0][:1], want[f"{case}.uncond"], 1e-5, 1e-4, f"{case}.uncond")
    assert_close(scheduler.alphas_cumprod[times[::-1]].double(), want[f"{case}.ddim_alphas"], 1e-6, 0, "ddim_alphas")
    for number in range(len(times)):
        if f"{case}.step{number}.eps" in want:
            name, call = f"{case}.step{number}", number + 1 if number else 0
            tight = number == 0
            assert_close(seen["eps"][call], want[f"{name}.eps"], 3e-5 if tight else 2e-3, 1e-4 if tight else 1e-3,
                         f"{name}.eps")
            assert_close(seen["x_prev"][number + 1], want[f"{name}.x_prev"], 2e-3, 1e-3, f"{name}.x_prev")
    assert_close(seen["x_prev"][-1], want[f"{case}.latents"], 2e-3, 1e-3, f"{case}.latents")
    check_pictures(model, case, images, want)
    if "diffusers_pndm_max_diff" in record:
        latents = model.denoise(settings, [], embeds, start=start)
        assert_close(latents, want[f"{case}.latents"], 2e-3, 1e-3, f"{case}.latents by the folder's sampler")


def check_pictures(model: StableDiffusionDetokenizer, case: str, images: np.ndarray, want: Tensors) -> None:
    from seed_multimodal.cli.seed1 import make_grid

    assert_close(images, want[f"{case}.images"], 2e-4, 0, f"{case}.images")
    pictures = model.to_images(want[f"{case}.latents"])
    pixels = np.stack([np.asarray(picture) for picture in pictures]).astype(int)
    assert_close(pixels, want[f"{case}.png"].int(), 1, 0, f"{case}.png")
    if f"{case}.grid" in want:
        assert_close(np.asarray(make_grid(pictures, len(pictures))).astype(int), want[f"{case}.grid"].int(), 1, 0,
                     f"{case}.grid")


@torch.no_grad()
def check(folder: Path) -> None:
    sizes, meta = read_json(folder / "config.json"), read_json(folder / "meta.json")
    names = read_json(folder / "diffusers_key_map.json")
    weights, given, want = (read_tensors(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    model = build(sizes, weights, names)
    assert_same(model.factor, sizes["downsampling"], "pixels along a latent")
    check_parts(model, given, want)
    for case, record in meta["cases"].items():
        check_case(model, case, record, given, want)
