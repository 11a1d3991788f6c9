"""SEED's de-tokenizers: SEED-1 with Stable Diffusion (noise schedule, PLMS steps, latents, images,
the grid), SEED-2 with unCLIP (class labels, prompt embeddings, latents for every scheduler and
case, the image).

The recorded noise is replayed in order. SEED-1: if the number of steps divides 1000, the folder's
sampler is compared too; otherwise its time steps are not those of CompVis. Not compared: `pred_x0`
(`x_prev` follows from it), errors of the originals (3 or 9 steps, two embeddings a call: all work
here), watermarks.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runner import assert_all_close, assert_close, assert_same, part, read_case, read_json

from seed_multimodal.models.seed.diffusion import StableDiffusionDetokenizer, UnclipDetokenizer
from seed_multimodal.weights import assign_strictly

Tensors = dict[str, torch.Tensor]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "negative": {"guidance_scale": 5.0},
    "no_guidance": {"guidance_scale": 1.0},
    "noise_level_3": {"noise_level": 3},
}


# ---- parts of a pipeline at recorded sizes


def network(kind: str, config: Mapping[str, Any], weights: Tensors, **options: Any) -> Any:
    """A class of diffusers with recorded weights."""
    import diffusers

    model = getattr(diffusers, kind).from_config(dict(config)).eval()
    assign_strictly(model, weights, kind, **options)
    return model


def scheduler(settings: Mapping[str, Any], key: str = "class", suffix: str = "") -> Any:
    """A scheduler of diffusers; `key` holds the name of its class."""
    import diffusers

    settings = dict(settings)
    return getattr(diffusers, settings.pop(key) + suffix).from_config(settings)


def text_parts(sizes: dict[str, Any], length: int, weights: Tensors) -> dict[str, Any]:
    """Tokenizer and text encoder of a pipeline."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(sizes["tokenizer_vocab"]))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=length)
    model = CLIPTextModel(CLIPTextConfig(**sizes["text_encoder"])).eval()
    if not any(
        key.startswith("text_model.") for key in model.state_dict()
    ):  # transformers 5 dropped the prefix
        weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
    assign_strictly(model, weights, "text_encoder", allow_unexpected=["*position_ids"])
    return {"tokenizer": tokenizer, "text_encoder": model}


@contextmanager
def watched(model: Any) -> Iterator[dict[str, list[Any]]]:
    """Arguments of each call of the U-Net; prediction and result of each step of the scheduler."""
    recorded: dict[str, list[Any]] = {
        name: [] for name in ("timesteps", "shapes", "labels", "context", "eps", "x_prev")
    }
    step = model.scheduler.step

    def note(_module: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
        for name, value in (
            ("shapes", list(arguments[0].shape)),
            ("timesteps", int(arguments[1])),
            ("labels", keywords.get("class_labels")),
            ("context", keywords["encoder_hidden_states"]),
        ):
            recorded[name].append(value)

    def stepped(prediction: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        result = step(prediction, *arguments, **keywords)
        recorded["eps"].append(prediction)
        recorded["x_prev"].append(result[0])
        return result

    handle = model.unet.register_forward_pre_hook(note, with_kwargs=True)
    model.scheduler.step = stepped
    try:
        yield recorded
    finally:
        handle.remove()
        del model.scheduler.step


# ---- SEED-1


def build_seed1(
    sizes: dict[str, Any], weights: Tensors, names: dict[str, str]
) -> StableDiffusionDetokenizer:
    """Tensors under the names of diffusers; the VAE's attention is stored as 1x1 convolutions."""

    def named(name: str, flat: str = "-") -> Tensors:
        tensors = {
            key.removeprefix(f"{name}."): weights[stored]
            for key, stored in names.items()
            if key.startswith(f"{name}.")
        }
        return {
            key: value.squeeze() if flat in key and value.ndim == 4 else value
            for key, value in tensors.items()
        }

    parts = sizes["diffusers"]
    vae = network(
        "AutoencoderKL",
        parts["vae"],
        named("vae", "attentions"),
        allow_missing=["encoder.*", "quant_conv.*"],
    )
    text = text_parts(sizes, sizes["text_length"], part(weights, "cond_stage_model.transformer"))
    return StableDiffusionDetokenizer(
        network("UNet2DConditionModel", parts["unet"], named("unet")),
        vae,
        scheduler(parts["scheduler"], "_class"),
        **text,
    )


def plms(config: Any, steps: list[int]) -> Any:
    """The folder's sampler at the time steps of the CompVis program, which repeats the second
    one."""
    from diffusers import PNDMScheduler

    class Plms(PNDMScheduler):
        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            super().set_timesteps(num_inference_steps, device)
            self._timesteps = np.array(steps[::-1])
            self.timesteps = torch.tensor([steps[0], steps[1], *steps[1:]])

    return Plms.from_config(config)


def check_seed1_case(
    model: StableDiffusionDetokenizer,
    case: str,
    record: dict[str, Any],
    inputs: Tensors,
    want: Tensors,
) -> None:
    start = inputs[f"{case}.x_T"]
    scheduler = model.scheduler
    times = record["timesteps"]
    embeds = inputs["text_features"].expand(len(start), -1, -1)
    settings = model.check_settings(
        num_inference_steps=record["steps_requested"], guidance_scale=record["scale"]
    )
    model.scheduler = plms(scheduler.config, times)
    with watched(model) as recorded:
        latents = model.denoise(settings, [], embeds, start=start)
    alphas = model.scheduler.alphas_cumprod[times[::-1]].double()
    model.scheduler = scheduler
    assert_same(
        recorded["timesteps"],
        [times[0], times[1], *times[1:]],
        f"{case}: time steps of the U-Net's calls",
    )
    calls: Any = [
        [shape, time] for shape, time in zip(recorded["shapes"], recorded["timesteps"], strict=True)
    ]
    calls = calls if isinstance(record["unet_calls"], list) else len(calls)
    assert_same(calls, record["unet_calls"], f"{case}: calls of the U-Net")
    if f"{case}.uncond" in want:
        assert_close(
            recorded["context"][0][:1], want[f"{case}.uncond"], 1e-5, 1e-4, f"{case}.uncond"
        )
    assert_close(alphas, want[f"{case}.ddim_alphas"], 1e-6, 0, "ddim_alphas")
    for step in range(len(times)):
        if (name := f"{case}.step{step}.eps") in want:
            call, close = (step + 1, (2e-3, 1e-3)) if step else (0, (3e-5, 1e-4))
            assert_close(recorded["eps"][call], want[name], *close, name)
            name = f"{case}.step{step}.x_prev"
            assert_close(recorded["x_prev"][step + 1], want[name], 2e-3, 1e-3, name)
    assert_close(recorded["x_prev"][-1], want[f"{case}.latents"], 2e-3, 1e-3, f"{case}.latents")
    check_images(model, case, model.decode(latents).permute(0, 2, 3, 1), want)
    if "diffusers_pndm_max_diff" in record:
        latents = model.denoise(settings, [], embeds, start=start)
        assert_close(
            latents,
            want[f"{case}.latents"],
            2e-3,
            1e-3,
            f"{case}.latents with the folder's sampler",
        )


def check_images(
    model: StableDiffusionDetokenizer, case: str, images: torch.Tensor, want: Tensors
) -> None:
    from seed_multimodal.compat.seed_llama_programs import make_grid

    assert_close(images, want[f"{case}.images"], 2e-4, 0, f"{case}.images")
    decoded = model.to_images(want[f"{case}.latents"])
    pixels = {"png": np.stack([np.array(image) for image in decoded])}
    if f"{case}.grid" in want:
        pixels["grid"] = np.array(make_grid(decoded, len(decoded)))
    assert_all_close(pixels, want, 1, 0, f"{case}.{{}}")


@torch.no_grad()
def check_seed1(folder: Path) -> None:
    (sizes, weights, inputs, want) = read_case(folder)
    meta = read_json(folder / "meta.json")
    weights = {
        name: value.float() if value.is_floating_point() else value
        for name, value in weights.items()
    }
    model = build_seed1(sizes, weights, read_json(folder / "diffusers_key_map.json"))
    assert_same(model.factor, sizes["downsampling"], "pixels along a latent")
    assert_close(model.scheduler.betas, want["schedule.betas"], 1e-9, 1e-5, "betas")
    assert_close(
        model.scheduler.alphas_cumprod,
        want["schedule.alphas_cumprod"],
        1e-7,
        1e-5,
        "alphas_cumprod",
    )
    output = model.unet(
        want["unet.x"], want["unet.t"], encoder_hidden_states=want["unet.context"]
    ).sample
    assert_close(output, want["unet.out"], 1e-5, 1e-4, "unet.out")
    raw = model.vae.decode(want["default.latents"][:1] / model.vae.config.scaling_factor).sample
    assert_close(raw, want["vae.raw"], 2e-4, 1e-4, "vae.raw")
    assert_close(inputs["text_features"], want["unet.context"][1:], 0, 0, "the conditional half")
    for case, record in meta["cases"].items():
        check_seed1_case(model, case, record, inputs, want)


# ---- SEED-2


@contextmanager
def replayed(noises: list[torch.Tensor]) -> Iterator[None]:
    """Replace `torch.randn` by recorded noise, all of which must be used."""
    original = torch.randn
    rest = list(noises)

    def recorded(*_: Any, generator: Any = None, **__: Any) -> torch.Tensor:
        assert rest, "more noise than recorded"
        return rest.pop(0)[0]

    torch.randn = recorded
    try:
        yield
    finally:
        torch.randn = original
    assert not rest, f"{len(rest)} recorded noise tensors were not used"


def build_seed2(sizes: dict[str, Any], weights: Tensors) -> UnclipDetokenizer:
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    normalizer = StableUnCLIPImageNormalizer(sizes["embedding_dim"])
    assign_strictly(normalizer, part(weights, "image_normalizer"), "image_normalizer")
    return UnclipDetokenizer(
        network("UNet2DConditionModel", sizes["unet"], part(weights, "unet")),
        network("AutoencoderKL", sizes["vae"], part(weights, "vae")),
        scheduler(next(iter(sizes["schedulers"].values()))),
        normalizer,
        scheduler(sizes["image_noising_scheduler"]),
        **text_parts(sizes, sizes["tokenizer_max_length"], part(weights, "text_encoder")),
    )


def noises(want: Tensors, prefix: str) -> list[torch.Tensor]:
    return [want[f"{prefix}noise{k}"] for k in range(len(want)) if f"{prefix}noise{k}" in want]


def check_seed2_case(
    model: UnclipDetokenizer, case: str, record: dict[str, Any], inputs: Tensors, want: Tensors
) -> None:
    kind = case.split(".")[1]
    settings = model.check_settings(num_inference_steps=record["steps"], **ARGUMENTS.get(kind, {}))
    embeds = inputs["image_embeds"]
    start = inputs["latents"]
    latent_noise = noises(want, case)
    generators = [torch.Generator()]
    if kind == "two_per_prompt":  # one noise for both
        start = torch.cat([start, start.flip(-1)])
        embeds = embeds.expand(2, -1)
        generators = 2 * generators
        latent_noise = [noise for noise in latent_noise for _ in range(2)]
    with replayed(latent_noise), watched(model) as recorded:
        result = model.denoise(
            settings,
            generators,
            embeds,
            start=start,
            negatives=inputs["negative_image_embeds"] if kind == "negative" else None,
        )
    assert_same(recorded["timesteps"], record["timesteps"], f"{case}timesteps")
    assert_close(
        recorded["labels"][0], want[f"{case}class_labels"], 1e-5, 1e-5, f"{case}class_labels"
    )
    if f"{case}prompt_embeds" in want:
        assert_close(
            recorded["context"][0], want[f"{case}prompt_embeds"], 1e-5, 1e-4, f"{case}prompt_embeds"
        )
    assert_close(result, want[f"{case}latents"], 1e-3, 1e-3, f"{case}latents")


@torch.no_grad()
def check_seed2(folder: Path) -> None:
    (sizes, weights, inputs, want) = read_case(folder)
    meta = read_json(folder / "meta.json")
    model = build_seed2(sizes, weights)
    steps = dict[str, int]()
    ids = model.tokenizer(
        "", padding="max_length", max_length=model.tokenizer.model_max_length
    ).input_ids
    assert_same(ids, meta["empty_prompt_ids"], "token ids of the empty prompt")
    for level in sorted(
        {int(name.split(".")[1]) for name in inputs if name.startswith("noising.")}
    ):
        noise = inputs[f"noising.{level}.noise"]
        embeds = inputs[f"noising.{level}.embeds"]
        with replayed(list(noise.split(1))):
            output = model.class_labels(embeds, level, [torch.Generator()] * len(embeds))
        assert_close(output, want[f"noising.{level}.output"], 1e-5, 1e-5, f"noising.{level}")
    for case, record in meta["cases"].items():
        name = case.split(".")[0]
        steps[name] = record["steps"]
        model.scheduler = scheduler(sizes["schedulers"][name])
        if record["ok"]:
            check_seed2_case(model, case, record, inputs, want)
    for name in (n for n in sizes["schedulers"] if f"{n}.image.float" in want):
        model.scheduler = scheduler(sizes["schedulers"][name])
        with replayed(noises(want, f"{name}.image.")):
            latents = model.denoise(
                model.check_settings(num_inference_steps=steps[name]),
                [torch.Generator()],
                inputs["image_embeds"],
                start=inputs["latents"],
            )
        pixels = model.decode(latents)[0].permute(1, 2, 0)
        assert_close(pixels, want[f"{name}.image.float"][0], 2e-3, 0, f"{name}.image")


KINDS = {"seed1_sd_decode": check_seed1, "seed2_unclip_decode": check_seed2}
