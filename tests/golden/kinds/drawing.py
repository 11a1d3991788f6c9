"""SEED's de-tokenizers: SEED-1 with Stable Diffusion (noise schedule, PLMS steps, latents, images,
the grid), SEED-2 with unCLIP (class labels, prompt embeddings, latents for every scheduler and
case, the image).

The recorded noise is replayed in order. SEED-1: if the number of steps divides 1000, the folder's
sampler is compared too; otherwise its time steps are not those of CompVis. Not compared: `pred_x0`
(`x_prev` follows from it), errors of the originals (3 or 9 steps, two embeddings a call: all work
here), watermarks.
"""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from runner import Tensors, assert_close, assert_same

from seed_multimodal.compat.demo_recon import make_grid
from seed_multimodal.models.seed.diffusion import StableDiffusionDetokenizer, UnclipDetokenizer
from seed_multimodal.state_dicts import assign_strictly

ARGUMENTS: dict[str, dict] = {
    "negative": {"guidance_scale": 5.0},
    "no_guidance": {"guidance_scale": 1.0},
    "noise_level_3": {"noise_level": 3},
}
FIRST_STEP = 3e-5, 1e-4
STEPS = 2e-3, 1e-3  # errors grow from step to step
PIXELS = 2e-4, 0


# ---- parts of a pipeline at recorded sizes


def network(kind: str, config: Mapping, weights: Mapping, **options):
    """A class of diffusers with recorded weights."""
    import diffusers

    model = getattr(diffusers, kind).from_config(dict(config)).eval()
    assign_strictly(model, weights, kind, **options)
    return model


def scheduler(settings: Mapping, key="class", suffix: str = ""):
    """A scheduler of diffusers; `key` holds the name of its class."""
    import diffusers

    settings = dict(settings)
    return getattr(diffusers, settings.pop(key) + suffix).from_config(settings)


def text_parts(sizes, length, weights: Mapping) -> dict:
    """Tokenizer and text encoder of a pipeline."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(sizes["tokenizer_vocab"]))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=length)
    model = CLIPTextModel(CLIPTextConfig(**sizes["text_encoder"])).eval()
    if "text_model" not in {name.partition(".")[0] for name in model.state_dict()}:
        # transformers 5 dropped the prefix.
        weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
    assign_strictly(model, weights, "text_encoder", allow_unexpected=["*position_ids"])
    return {"tokenizer": tokenizer, "text_encoder": model}


@contextmanager
def watched(model) -> Iterator[dict[str, list]]:
    """Arguments of each call of the U-Net; prediction and result of each step of the scheduler."""
    recorded = defaultdict(list)
    step = model.scheduler.step

    def note(_module, arguments: tuple, keywords: dict):
        recorded["calls"].append([list(arguments[0].shape), int(arguments[1])])
        recorded["labels"].append(keywords.get("class_labels"))
        recorded["context"].append(keywords["encoder_hidden_states"])

    def stepped(prediction: torch.Tensor, *arguments, **keywords):
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


def build_seed1(recording) -> StableDiffusionDetokenizer:
    """Tensors under the names of diffusers; the VAE's attention is stored as 1x1 convolutions."""
    sizes = recording.config
    parts = sizes["diffusers"]
    weights = Tensors(
        {
            name: value.float() if value.is_floating_point() else value
            for name, value in recording.weights.items()
        }
    )
    named = Tensors(
        {new: weights[old] for new, old in recording.json("diffusers_key_map.json").items()}
    )
    vae = {
        key: value.squeeze() if "attentions" in key and value.ndim == 4 else value
        for key, value in named.part("vae").items()
    }
    text = weights.part("cond_stage_model.transformer")
    return StableDiffusionDetokenizer(
        network("UNet2DConditionModel", parts["unet"], named.part("unet")),
        network("AutoencoderKL", parts["vae"], vae, allow_missing=["encoder.*", "quant_conv.*"]),
        scheduler(parts["scheduler"], "_class"),
        **text_parts(sizes, sizes["text_length"], text),
    )


def plms(config, steps: list[int]):
    """The folder's sampler at the time steps of the CompVis program, which repeats the second
    one."""
    from diffusers import PNDMScheduler

    class Plms(PNDMScheduler):
        def set_timesteps(self, num_inference_steps, device=None):
            super().set_timesteps(num_inference_steps, device)
            self._timesteps = np.array(steps[::-1])
            self.timesteps = torch.tensor([steps[0], steps[1], *steps[1:]])

    return Plms.from_config(config)


def check_seed1_case(model: StableDiffusionDetokenizer, record, inputs: Tensors, want: Tensors):
    start = inputs["x_T"]
    folder_sampler = model.scheduler
    times = record["timesteps"]
    embeds = inputs["text_features"].expand(len(start), -1, -1)
    settings = model.check_settings(
        num_inference_steps=record["steps_requested"], guidance_scale=record["scale"]
    )
    # 1. The denoising.
    model.scheduler = plms(folder_sampler.config, times)
    with watched(model) as recorded:
        latents = model.denoise(settings, [], embeds, start=start)
    calls = recorded["calls"]
    called = [time for _, time in calls]
    assert_same(called, [times[0], times[1], *times[1:]], f"{want.prefix}time steps of the calls")
    calls = calls if isinstance(record["unet_calls"], list) else len(calls)
    assert_same(calls, record["unet_calls"], f"{want.prefix}calls of the U-Net")
    # The empty text, and the schedule in the order of the steps.
    if "uncond" in want:
        want.close("uncond", recorded["context"][0][:1])
    alphas = model.scheduler.alphas_cumprod[times[::-1]].double()
    want.close("ddim_alphas", alphas, (1e-6, 0))
    for step in range(len(times)):
        if (name := f"step{step}.eps") in want:
            call, tolerance = (step + 1, STEPS) if step else (0, FIRST_STEP)
            want.close(name, recorded["eps"][call], tolerance)
            want.close(f"step{step}.x_prev", recorded["x_prev"][step + 1], STEPS)
    want.close("latents", recorded["x_prev"][-1], STEPS)

    # 2. The images.
    model.scheduler = folder_sampler
    want.close("images", model.decode(latents).permute(0, 2, 3, 1), PIXELS)
    decoded = model.to_images(want["latents"])
    want.close("png", np.stack([np.array(image) for image in decoded]), (1, 0))
    if "grid" in want:
        want.close("grid", np.array(make_grid(decoded, len(decoded))), (1, 0))
    if "diffusers_pndm_max_diff" in record:
        want.close("latents", model.denoise(settings, [], embeds, start=start), STEPS)


@torch.no_grad()
def check_seed1(recording):
    inputs = recording.inputs
    want = recording.outputs
    model = build_seed1(recording)
    assert_same(model.factor, recording.config["downsampling"], "pixels along a latent")

    # 1. Each part alone.
    want.close("schedule.betas", model.scheduler.betas, (1e-9, 1e-5))
    want.close("schedule.alphas_cumprod", model.scheduler.alphas_cumprod, (1e-7, 1e-5))
    context = want["unet.context"]
    output = model.unet(want["unet.x"], want["unet.t"], encoder_hidden_states=context).sample
    want.close("unet.out", output)
    latents = want["default.latents"][:1] / model.vae.config.scaling_factor
    want.close("vae.raw", model.vae.decode(latents).sample, (2e-4, 1e-4))
    inputs.close("text_features", context[1:], (0, 0))

    # 2. Whole drawings.
    for case, record in recording.meta["cases"].items():
        case_inputs = Tensors({**inputs.part(case), "text_features": inputs["text_features"]})
        check_seed1_case(model, record, case_inputs, want.part(case))


# ---- SEED-2


@contextmanager
def replayed(noises: list[torch.Tensor]) -> Iterator[None]:
    """Replace `torch.randn` by recorded noise, all of which must be used."""
    original = torch.randn
    rest = list(noises)

    def recorded(*_, generator=None, **__) -> torch.Tensor:
        assert rest, "more noise than recorded"
        return rest.pop(0)[0]

    torch.randn = recorded
    try:
        yield
    finally:
        torch.randn = original
    assert not rest, f"{len(rest)} recorded noise tensors were not used"


def build_seed2(sizes, weights: Tensors) -> UnclipDetokenizer:
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    normalizer = StableUnCLIPImageNormalizer(sizes["embedding_dim"])
    assign_strictly(normalizer, weights.part("image_normalizer"), "image_normalizer")
    return UnclipDetokenizer(
        network("UNet2DConditionModel", sizes["unet"], weights.part("unet")),
        network("AutoencoderKL", sizes["vae"], weights.part("vae")),
        scheduler(next(iter(sizes["schedulers"].values()))),
        normalizer,
        scheduler(sizes["image_noising_scheduler"]),
        **text_parts(sizes, sizes["tokenizer_max_length"], weights.part("text_encoder")),
    )


def denoised(
    model: UnclipDetokenizer, case: str, steps, inputs: Tensors, want: Tensors
) -> tuple[torch.Tensor, dict[str, list]]:
    """Latents of a case with its recorded noise, and what the U-Net was given."""
    kind = case.split(".")[1]
    settings = model.check_settings(num_inference_steps=steps, **ARGUMENTS.get(kind, {}))
    embeds = inputs["image_embeds"]
    start = inputs["latents"]
    noise = [want[f"{case}noise{k}"] for k in range(len(want)) if f"{case}noise{k}" in want]
    generators = [torch.Generator()]
    if kind == "two_per_prompt":  # one noise for both
        start = torch.cat([start, start.flip(-1)])
        embeds = embeds.expand(2, -1)
        generators = 2 * generators
        noise = [row for row in noise for _ in range(2)]
    negatives = inputs["negative_image_embeds"] if kind == "negative" else None
    with replayed(noise), watched(model) as recorded:
        latents = model.denoise(settings, generators, embeds, start=start, negatives=negatives)
    return latents, recorded


@torch.no_grad()
def check_seed2(recording):
    sizes = recording.config
    inputs = recording.inputs
    want = recording.outputs
    model = build_seed2(sizes, recording.weights)
    length = model.tokenizer.model_max_length
    # The empty prompt is padded to the encoder's length.
    ids = model.tokenizer("", padding="max_length", max_length=length).input_ids
    assert_same(ids, recording.meta["empty_prompt_ids"], "token ids of the empty prompt")

    # 1. Class labels: noise is added to embeddings.
    noising = inputs.part("noising")
    for level in noising.parts():
        embeds = noising[f"{level}.embeds"]
        with replayed(list(noising[f"{level}.noise"].split(1))):
            output = model.class_labels(embeds, int(level), [torch.Generator()] * len(embeds))
        want.close(f"noising.{level}.output", output, (1e-5, 1e-5))

    # 2. Latents of every scheduler and case.
    steps = {}
    for case, record in recording.meta["cases"].items():
        name = case.split(".")[0]
        steps[name] = record["steps"]
        if not record["ok"]:  # the original failed
            continue
        model.scheduler = scheduler(sizes["schedulers"][name])
        latents, recorded = denoised(model, case, record["steps"], inputs, want)
        times = [time for _, time in recorded["calls"]]
        assert_same(times, record["timesteps"], f"{case}timesteps")
        want.close(f"{case}class_labels", recorded["labels"][0], (1e-5, 1e-5))
        if (prompt := f"{case}prompt_embeds") in want:
            want.close(prompt, recorded["context"][0])
        want.close(f"{case}latents", latents, (1e-3, 1e-3))

    # 3. Images.
    for name, settings in sizes["schedulers"].items():
        if f"{name}.image.float" in want:
            model.scheduler = scheduler(settings)
            latents, _ = denoised(model, f"{name}.image.", steps[name], inputs, want)
            pixels = model.decode(latents).permute(0, 2, 3, 1)
            expected = want[f"{name}.image.float"]
            assert_close(pixels[:1], expected[:1], 2e-3, 0, f"{name}.image")


KINDS = {"seed1_sd_decode": check_seed1, "seed2_unclip_decode": check_seed2}
UNREAD = {"seed1_sd_decode": ("*.pred_x0", "*.ddim_alphas_prev")}
