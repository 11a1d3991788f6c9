"""SEED-X's networks except the agent: vision encoder, resamplers, SDXL adapters.

* `seedx_visual`: every recorded activation from pixels to features; resamplers, sines and resized
positions separately.
* `seedx_resamplers`: perceivers between features and SDXL: the original one (`xlv2`), older ones,
the attention pool.
* `seedx_sdxl_adapter`: prompt embeddings, losses and gradients of both stages, images of both
pipelines. Not as the
  original, which is wrong there: keys and values in the optimizer are trained, the widened first
  convolution keeps its bias, 16 embeddings have 16 negative ones (`embeds16_with_vit_down` failed).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from kinds.drawing import network, scheduler
from PIL import Image
from runner import assert_all_close, assert_close, assert_same, part, read_case, read_json
from torch import Tensor, nn

from seed_multimodal.models.seed_x.adapter import ResamplerXLConfig, ResamplerXLV2, SDXLAdapter
from seed_multimodal.models.seed_x.diffusion import SdxlDetokenizer
from seed_multimodal.nn.layers import AttentionPool, resize_square
from seed_multimodal.nn.vision.qwen import (
    QwenVit,
    QwenVitConfig,
    Resampler,
    ResamplerConfig,
    sine_table,
)
from seed_multimodal.weights import assign_strictly

Tensors = dict[str, Tensor]


# ---- vision encoder


def recorded(model: QwenVit) -> Tensors:
    """Activations by the names of the fixture, filled by hooks."""
    outputs: Tensors = {}
    for name in ("ln_pre", "transformer", "attn_pool", "ln_post"):
        getattr(model, name).register_forward_hook(
            lambda module, inputs, output, name=name: outputs.update(
                {name: output, f"before_{name}": inputs[0]}
            )
        )
    return outputs


def check_resampler(label: str, heads: int, x: Tensor, weights: Tensors, want: Tensor) -> None:
    queries, width = weights["query"].shape
    resampler = Resampler(
        ResamplerConfig(
            grid_size=math.isqrt(queries), embed_dim=width, num_heads=heads, kv_dim=x.shape[-1]
        )
    ).eval()
    assert_close(resampler.pos_embed, weights["pos_embed"], 1e-6, what=f"{label}: sines")
    assign_strictly(resampler, weights, label)
    assert_close(resampler(x), want, 1e-5, 1e-4, f"{label}.output")


@torch.no_grad()
def check_visual(folder: Path) -> None:
    sizes, weights, case_inputs, want = read_case(folder)
    for settings in sizes["models"]:
        label = settings.pop("label")
        model = QwenVit(QwenVitConfig(**settings)).eval()
        inputs = part(case_inputs, label)
        activations = part(want, label)
        assign_strictly(model, part(weights, label), label)
        outputs = recorded(model)
        outputs["output"] = model(inputs["image"], inputs.get("patch_positions"))
        outputs["transformer_lnd"] = outputs["transformer"].transpose(0, 1)
        assert activations, f"{label}: nothing recorded"
        assert_all_close({name: outputs[name] for name in activations}, activations, 1e-5, 1e-4)
        want = {name: value for name, value in want.items() if not name.startswith(f"{label}.")}
    for label, settings in sizes["resamplers"].items():
        state = part(weights, label)
        assert_same(list(state["query"].shape), settings["shape_of_query"], f"{label}: queries")
        check_resampler(
            label,
            settings["num_heads"],
            case_inputs[f"{label}.x"],
            state,
            want.pop(f"{label}.output"),
        )
    for name, value in want.items():
        label, _, rest = name.partition(".")
        if label == "abs_pos":
            side = math.isqrt(int(rest.removeprefix("to_")))
            assert_close(resize_square(case_inputs["abs_pos.src"], side), value, 1e-6, 1e-5, name)
        else:
            assert_same(label, "sincos", "a known part")
            assert_close(sine_table(*map(int, rest.split("x"))), value, 1e-6, what=name)


# ---- perceivers


class Plain(nn.Module):
    """The original's unused `Resampler`: layers of the perceiver, one projection, then the norm."""

    def __init__(self, sizes: dict[str, Any], output: int) -> None:
        super().__init__()
        resampler = ResamplerXLV2(ResamplerXLConfig(**sizes))
        self.latents = resampler.latents
        self.proj_in = resampler.proj_in
        self.layers = resampler.layers
        self.proj_out = nn.Linear(sizes["dim"], output)
        self.norm_out = nn.LayerNorm(output)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.latents.expand(len(x), -1, -1)
        x = self.proj_in(x)
        for attention, feed_forward in self.layers:
            queries = queries + attention(x, queries)
            queries = queries + feed_forward(queries)
        return self.norm_out(self.proj_out(queries))


@torch.no_grad()
def check_resamplers(folder: Path) -> None:
    config, *tensors = read_case(folder)
    for label, sizes in config.items():
        weights, case_inputs, want = (part(group, label) for group in tensors)
        kind = "pool" if label == "attnpool" else sizes.pop("class")
        if kind == "pool":  # only the first row of `all_tokens`: the pool computes that row alone
            model: nn.Module = AttentionPool(
                *(sizes[k] for k in ("seq_len", "embed_dim", "num_heads", "output_dim"))
            )
            want["all_tokens"] = want["all_tokens"][0]
        elif kind == "plain":
            model = Plain(sizes, sizes.pop("output_dim"))
        else:
            assert kind in ("xlv2", "xlv2_normalize", "xl"), f"{label}: unknown perceiver {kind!r}"
            model = ResamplerXLV2(ResamplerXLConfig(**sizes))
        assign_strictly(model.eval(), weights, label)
        output = model(case_inputs["x"])
        outputs = (
            {"output": output}
            if isinstance(output, Tensor)
            else {"prompt_embeds": output[0], "pooled": output[1]}
        )
        if kind == "pool":
            outputs["all_tokens"] = output
        assert outputs.keys() == want.keys(), f"{label}: recorded are {', '.join(want)}"
        assert_all_close(outputs, want, 1e-5, 1e-4)


# ---- SDXL adapters


class Encoder(nn.Module):
    """Replaces the vision encoder: a convolution, its positions as tokens `[B, N, W]`."""

    def __init__(self, weights: Tensors) -> None:
        super().__init__()
        out, channels, size, _ = weights["weight"].shape
        self.conv = nn.Conv2d(channels, out, size, size)
        self.conv.load_state_dict(weights)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.conv(pixels).flatten(2).mT


def build(sizes: dict[str, Any], weights: Tensors, stage: int) -> SdxlDetokenizer:
    from diffusers import UNet2DConditionModel

    state = part(weights, "adapter") | (part(weights, "latent") if stage == 2 else {})
    unet = {**sizes["unet"], "in_channels": state["unet.conv_in.weight"].shape[1]}
    adapter = SDXLAdapter(
        UNet2DConditionModel.from_config(unet),
        ResamplerXLV2(ResamplerXLConfig(**sizes["resampler"])),
    ).eval()
    assign_strictly(adapter, state, "adapter")
    assert_same(adapter.reads_condition, stage == 2, "stage")
    return SdxlDetokenizer(
        adapter,
        network("AutoencoderKL", sizes["vae"], part(weights, "vae")),
        scheduler(sizes["scheduler"], "cls", "Scheduler"),
    )


def check_prompts(
    model: SdxlDetokenizer, encoder: Encoder, case_inputs: Tensors, want: Tensors
) -> None:
    inputs = {
        "tensor": encoder(case_inputs["picture"]),
        "embeds_down": case_inputs["embeds_pooled4"],
        "embeds_nodown": case_inputs["embeds16"],
        "embeds": case_inputs["embeds16"],
    }
    for case in sorted(
        {name.split(".")[1] for name in want if name.startswith("get_image_embeds.")}
    ):
        embeds = inputs[case.rsplit("_", 1)[0]]
        negative = case.endswith("_neg")
        count = len(embeds)
        prompt, pooled = model.prompts(embeds, model.null_embeds if negative else None)
        outputs = {"embeds": prompt[-count:], "pooled": pooled[-count:]}
        outputs |= {"neg_embeds": prompt[:count], "neg_pooled": pooled[:count]} if negative else {}
        expected = part(want, f"get_image_embeds.{case}")
        assert_same(outputs.keys(), expected.keys(), f"results of {case}")
        assert_all_close(outputs, expected, 1e-5, 1e-4)


def check_training(
    adapter: SDXLAdapter, name: str, meta: dict[str, Any], case_inputs: Tensors, want: Tensors
) -> None:
    """One step: prediction, loss, which parameters are trained, norms of their gradients."""
    trained = adapter.set_trainable("all" if name == "adapter.full_True" else "key_value")
    chosen = {key for key, value in adapter.named_parameters() if value.requires_grad}
    assert_same(len(trained), len(chosen), f"{name}: parameters given")
    assert_same(
        sorted(chosen), sorted(meta[f"{name}.optimizer_parameters"]), f"{name}: trained parameters"
    )
    channels = adapter.latent_channels
    noisy = case_inputs["noisy_latents_8ch" if adapter.reads_condition else "noisy_latents"]
    adapter.zero_grad()
    with torch.enable_grad():
        prediction = adapter(
            noisy[:, :channels],
            case_inputs["timesteps"],
            case_inputs["image_embeds"],
            case_inputs["time_ids"],
            noisy[:, channels:] if adapter.reads_condition else None,
        )
        loss = torch.nn.functional.mse_loss(prediction, case_inputs["noise"])
        loss.backward()
    assert_close(prediction, want[f"{name}.noise_pred"], 1e-4, 1e-3, f"{name}.noise_pred")
    assert_close(loss, want[f"{name}.total_loss"], 1e-5, 1e-4, f"{name}.total_loss")
    for key, norm in meta.get(f"{name}.grad_norms", {}).items():
        assert_close(
            adapter.get_parameter(key).grad.norm(), norm, 1e-5, 2e-3, f"{name}: gradient of {key}"
        )
    assert_same(
        [key for key in chosen if adapter.get_parameter(key).grad is None],
        [],
        f"{name}: without gradient",
    )
    adapter.requires_grad_(False)


def check_images(
    model: SdxlDetokenizer, encoder: Encoder, case_inputs: Tensors, want: Tensors
) -> None:
    start = case_inputs["pipe.init_latents"]
    source = Image.fromarray(case_inputs["pipe.latent_image_uint8"].numpy())
    side = start.shape[-1] * model.factor
    for name in (name for name in want if name.startswith("pipe.")):
        _, kind, rest = name.split(".", 2)
        case, what = rest.rsplit(".", 1)
        if (kind == "edit") != model.adapter.reads_condition:
            continue
        if case == "from_embeds":  # with the original guidance of 7.5
            embeds = case_inputs["embeds_pooled4"]
            options = {"num_inference_steps": 3}
        else:
            guidance = (
                float(case.removeprefix("guidance_")) if case.startswith("guidance_") else 5.0
            )
            embeds = encoder(case_inputs["picture"])
            options = {"num_inference_steps": 4, "guidance_scale": guidance}
        latents = model.denoise(
            model.check_settings(height=side, width=side, **options),
            [torch.Generator()],
            embeds,
            model.null_embeds,
            [source] if kind == "edit" and case != "no_image" else None,
            start,
        )
        assert_close(
            latents if what == "latents" else model.decode(latents), want[name], 1e-4, 1e-3, name
        )


@torch.no_grad()
def check_adapter(folder: Path) -> None:
    (sizes, weights, case_inputs, want) = read_case(folder)
    meta = read_json(folder / "meta.json")
    encoder = Encoder(part(weights, "encoder.conv"))
    first, second = (build(sizes, weights, stage) for stage in (1, 2))
    for model in (first, second):
        model.set_null_embeds(encoder, case_inputs["picture"].shape[-1])
        check_images(model, encoder, case_inputs, want)
    check_prompts(first, encoder, case_inputs, want)
    check_training(first.adapter, "adapter.full_False", meta, case_inputs, want)
    check_training(first.adapter, "adapter.full_True", meta, case_inputs, want)
    check_training(second.adapter, "latent", meta, case_inputs, want)
    unet = first.adapter.unet
    bias = unet.conv_in.bias.clone()
    first.adapter.add_condition_channels()
    assert_close(
        unet.conv_in.weight, want["latent.conv_in_initial"], 0, 0, "latent.conv_in_initial"
    )
    assert_same(
        unet.config.in_channels, meta["latent.in_channels_config"], "latent.in_channels_config"
    )
    assert_close(unet.conv_in.bias, bias, 0, 0, "the bias, which the original does not copy")


KINDS = {
    "seedx_visual": check_visual,
    "seedx_resamplers": check_resamplers,
    "seedx_sdxl_adapter": check_adapter,
}
