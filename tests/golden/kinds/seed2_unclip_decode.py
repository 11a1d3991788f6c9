"""unCLIP decoding: class labels, prompt embeddings, latents for every scheduler and case, and the final picture.

The recorded noise tensors are replayed in the order in which they were drawn. diffusers and transformers are imported
inside functions, because every kind is read for every fixture. Not checked: the reference's refusal of
two embeddings in one call (`batch_of_two_embeds`), which works here.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from runner import assert_close, assert_same, read_json, read_tensors
from seed2_common import Tensors

from seed_multimodal.seed.diffusion import UnclipDetokenizer
from seed_multimodal.weights import assign_strictly

KIND = "seed2_unclip_decode"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {}, "negative": {"guidance_scale": 5.0}, "no_guidance": {"guidance_scale": 1.0},
    "noise_level_3": {"noise_level": 3}}


def _part(weights: Tensors, name: str) -> Tensors:
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def _scheduler(settings: dict[str, Any]) -> Any:
    import diffusers

    settings = dict(settings)
    return getattr(diffusers, settings.pop("class")).from_config(settings)


def _tokenizer(sizes: dict[str, Any]) -> Any:
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps(sizes["tokenizer_vocab"]))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=sizes["tokenizer_max_length"])


def _text_encoder(settings: dict[str, Any], weights: Tensors) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig(**settings)).eval()
    if not any(key.startswith("text_model.") for key in model.state_dict()):  # transformers 5 dropped the prefix
        weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
    assign_strictly(model, weights, "text_encoder", allow_unexpected=["*position_ids"])
    return model


def build(sizes: dict[str, Any], weights: Tensors) -> UnclipDetokenizer:
    import diffusers
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    unet = diffusers.UNet2DConditionModel.from_config(sizes["unet"]).eval()
    vae = diffusers.AutoencoderKL.from_config(sizes["vae"]).eval()
    normalizer = StableUnCLIPImageNormalizer(sizes["embedding_dim"])
    for name, module in (("unet", unet), ("vae", vae), ("image_normalizer", normalizer)):
        assign_strictly(module, _part(weights, name), name)
    return UnclipDetokenizer(
        unet, vae, _scheduler(next(iter(sizes["schedulers"].values()))), normalizer,
        _scheduler(sizes["image_noising_scheduler"]), tokenizer=_tokenizer(sizes),
        text_encoder=_text_encoder(sizes["text_encoder"], _part(weights, "text_encoder")))


@contextmanager
def replayed(noises: list[torch.Tensor]):
    """Hand out recorded noise instead of drawing it; all of it must be used."""
    original, rest = torch.randn, list(noises)

    def recorded(*_: Any, generator: Any = None, **__: Any) -> torch.Tensor:
        assert rest, "the model drew more noise than was recorded"
        return rest.pop(0)[0]

    torch.randn = recorded
    try:
        yield
    finally:
        torch.randn = original
    assert not rest, f"{len(rest)} recorded noise tensors were not drawn"


@contextmanager
def watched(model: UnclipDetokenizer):
    """What the U-Net received at its first call, and the time steps of all calls."""
    seen: dict[str, Any] = {"timesteps": []}

    def note(_module: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
        seen["timesteps"].append(int(arguments[1]))
        seen.setdefault("class_labels", keywords["class_labels"])
        seen.setdefault("prompt_embeds", keywords["encoder_hidden_states"])

    handle = model.unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _noises(want: Tensors, prefix: str) -> list[torch.Tensor]:
    return [want[f"{prefix}noise{k}"] for k in range(len(want)) if f"{prefix}noise{k}" in want]


def check_case(model: UnclipDetokenizer, case: str, record: dict[str, Any], given: Tensors, want: Tensors) -> None:
    kind = case.split(".")[1]
    settings = model.check_settings(num_inference_steps=record["steps"], **ARGUMENTS.get(kind, {}))
    embeds, start = given["image_embeds"], given["latents"]
    noises, generators = _noises(want, case), [torch.Generator()]
    if kind == "two_per_prompt":  # one noise for both
        start, embeds, generators = torch.cat([start, start.flip(-1)]), embeds.expand(2, -1), 2 * generators
        noises = [noise for noise in noises for _ in range(2)]
    with replayed(noises), watched(model) as seen:
        result = model.denoise(settings, generators, embeds, start=start,
                               negatives=given["negative_image_embeds"] if kind == "negative" else None)
    assert_same(seen["timesteps"], record["timesteps"], f"{case}timesteps")
    assert_close(seen["class_labels"], want[f"{case}class_labels"], 1e-5, 1e-5, f"{case}class_labels")
    if f"{case}prompt_embeds" in want:
        assert_close(seen["prompt_embeds"], want[f"{case}prompt_embeds"], 1e-5, 1e-4, f"{case}prompt_embeds")
    assert_close(result, want[f"{case}latents"], 1e-3, 1e-3, f"{case}latents")


@torch.no_grad()
def check(folder: Path) -> None:
    sizes, meta = read_json(folder / "config.json"), read_json(folder / "meta.json")
    weights, given, want = (read_tensors(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    model = build(sizes, weights)
    tokenizer = model.tokenizer
    ids = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length).input_ids
    assert_same(ids, meta["empty_prompt_ids"], "token ids of the empty prompt")
    for level in sorted({int(name.split(".")[1]) for name in given if name.startswith("noising.")}):
        noise, embeds = given[f"noising.{level}.noise"], given[f"noising.{level}.embeds"]
        with replayed(list(noise.split(1))):
            output = model.noised(embeds, level, [torch.Generator()] * len(embeds))
        assert_close(output, want[f"noising.{level}.output"], 1e-5, 1e-5, f"noising.{level}")
    steps: dict[str, int] = {}
    for case, record in meta["cases"].items():
        name = case.split(".")[0]
        steps[name] = record["steps"]
        model.scheduler = _scheduler(sizes["schedulers"][name])
        if record["ok"]:
            check_case(model, case, record, given, want)
    for name in (n for n in sizes["schedulers"] if f"{n}.image.float" in want):
        model.scheduler = _scheduler(sizes["schedulers"][name])
        with replayed(_noises(want, f"{name}.image.")):
            latents = model.denoise(model.check_settings(num_inference_steps=steps[name]), [torch.Generator()],
                                    given["image_embeds"], start=given["latents"])
        pixels = model.decode(latents)[0].permute(1, 2, 0)
        assert_close(pixels, want[f"{name}.image.float"][0], 2e-3, 0, f"{name}.image")
