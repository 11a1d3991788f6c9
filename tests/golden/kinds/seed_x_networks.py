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

import math

import torch
from kinds.drawing import network, scheduler
from PIL import Image
from runner import CLOSE, Tensors, assert_close, assert_same
from tiny.diffusion import PlainTower

from seed_multimodal.diffusion.training import reads_images, train_denoiser
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
from seed_multimodal.state_dicts import assign_strictly
from seed_multimodal.training.pixel_decoder.task import TrainedDetokenizer

# ---- vision encoder


def recorded(model: QwenVit) -> Tensors:
    """Activations by the names of the fixture, filled by hooks."""
    outputs = {}
    for name in ("ln_pre", "transformer", "attn_pool", "ln_post"):
        getattr(model, name).register_forward_hook(
            lambda module, inputs, output, name=name: outputs.update(
                {name: output, f"before_{name}": inputs[0]}
            )
        )
    return outputs


@torch.no_grad()
def check_visual(recording):
    sizes, weights, case_inputs, want = recording.case()

    # 1. The vision encoder, layer by layer.
    for settings in sizes["models"]:
        label = settings.pop("label")
        model = QwenVit(QwenVitConfig(**settings)).eval()
        inputs = case_inputs.part(label)
        activations = want.part(label)
        assign_strictly(model, weights.part(label), label)
        outputs = recorded(model)
        outputs["output"] = model(inputs["image"], inputs.get("patch_positions"))
        outputs["transformer_lnd"] = outputs["transformer"].transpose(0, 1)
        activations.compare(**{name: outputs[name] for name in activations})

    # 2. Resamplers; their positions are made, not loaded.
    for label, settings in sizes["resamplers"].items():
        state = weights.part(label)
        queries, width = state["query"].shape
        assert_same([queries, width], settings["shape_of_query"], f"{label}: queries")
        x = case_inputs[f"{label}.x"]
        side = math.isqrt(queries)
        resampler = Resampler(ResamplerConfig(side, width, settings["num_heads"], x.shape[-1]))
        state.close("pos_embed", resampler.pos_embed, (1e-6, 0))
        assign_strictly(resampler.eval(), state, label)
        want.close(f"{label}.output", resampler(x))

    # 3. Positions of other grids, and tables of sines.
    for size in want.part("abs_pos"):
        resized = resize_square(case_inputs["abs_pos.src"], math.isqrt(int(size[len("to_") :])))
        want.close(f"abs_pos.{size}", resized, (1e-6, 1e-5))
    for shape in want.part("sincos"):
        want.close(f"sincos.{shape}", sine_table(*map(int, shape.split("x"))), (1e-6, 0))


# ---- perceivers


@torch.no_grad()
def check_resamplers(recording):
    config, *tensors = recording.case()
    for label, sizes in config.items():
        weights, case_inputs, want = (group.part(label) for group in tensors)
        if label == "attnpool":
            names = ("seq_len", "embed_dim", "num_heads", "output_dim")
            pool = AttentionPool(*(sizes[name] for name in names)).eval()
            assign_strictly(pool, weights, label)
            output = pool(case_inputs["x"])
            # Of all tokens our pool computes the first row alone.
            want.close("output", output)
            assert_close(output, want["all_tokens"][0], *CLOSE, "all_tokens")
        elif sizes.pop("class") != "plain":
            model = ResamplerXLV2(ResamplerXLConfig(**sizes)).eval()
            assign_strictly(model, weights, label)
            prompt_embeds, pooled = model(case_inputs["x"])
            want.compare(prompt_embeds=prompt_embeds, pooled=pooled)


# ---- SDXL adapters


def build(sizes, weights: Tensors, stage: int) -> SdxlDetokenizer:
    from diffusers import UNet2DConditionModel

    state = weights.part("adapter") | (weights.part("latent") if stage == 2 else {})
    unet = {**sizes["unet"], "in_channels": state["unet.conv_in.weight"].shape[1]}
    adapter = SDXLAdapter(
        UNet2DConditionModel.from_config(unet),
        ResamplerXLV2(ResamplerXLConfig(**sizes["resampler"])),
    ).eval()
    assign_strictly(adapter, state, "adapter")
    assert_same(reads_images(adapter.unet), stage == 2, "stage")
    return SdxlDetokenizer(
        adapter.unet,
        network("AutoencoderKL", sizes["vae"], weights.part("vae")),
        scheduler(sizes["scheduler"], "cls", "Scheduler"),
        adapter.resampler,
    )


def check_prompts(model: SdxlDetokenizer, encoder: PlainTower, case_inputs: Tensors, want: Tensors):
    inputs = {
        "tensor": encoder(case_inputs["picture"]),
        "embeds_down": case_inputs["embeds_pooled4"],
        "embeds_nodown": case_inputs["embeds16"],
        "embeds": case_inputs["embeds16"],
    }
    for case in want.part("get_image_embeds").parts():
        embeds = inputs[case.rsplit("_", 1)[0]]
        negative = case.endswith("_neg")
        sizes = torch.zeros(len(embeds), 6)
        conditions, null = model.conditions(embeds, None, sizes, model.defaults, ())
        outputs = {
            "embeds": conditions["encoder_hidden_states"],
            "pooled": conditions["added_cond_kwargs"]["text_embeds"],
        }
        if negative:
            null_conditions = null()
            outputs["neg_embeds"] = null_conditions["encoder_hidden_states"]
            outputs["neg_pooled"] = null_conditions["added_cond_kwargs"]["text_embeds"]
        expected = want.part(f"get_image_embeds.{case}")
        assert_same(outputs.keys(), expected.keys(), f"results of {case}")
        expected.compare(**outputs)


def check_training(model: SdxlDetokenizer, name, meta, case_inputs: Tensors, want: Tensors):
    """One step: prediction, loss, which parameters are trained, norms of their gradients."""
    adapter = TrainedDetokenizer(model, model.trained).requires_grad_(True)
    train_denoiser(model.denoiser, "all" if name == "adapter.full_True" else "key_value")
    chosen = {key for key, value in adapter.named_parameters() if value.requires_grad}
    assert_same(
        sorted(chosen), sorted(meta[f"{name}.optimizer_parameters"]), f"{name}: trained parameters"
    )
    # Latents, behind them those of a condition image in the second stage.
    noisy = case_inputs["noisy_latents_8ch" if model.reads_condition else "noisy_latents"]
    adapter.zero_grad()
    with torch.enable_grad():
        prediction = adapter(
            noisy,
            case_inputs["timesteps"],
            case_inputs["image_embeds"],
            case_inputs["time_ids"],
            torch.zeros(len(noisy), dtype=torch.bool),
        )
        loss = torch.nn.functional.mse_loss(prediction, case_inputs["noise"])
        loss.backward()
    want.close(f"{name}.noise_pred", prediction, (1e-4, 1e-3))
    want.close(f"{name}.total_loss", loss)
    for key, norm in meta.get(f"{name}.grad_norms", {}).items():
        assert_close(
            adapter.get_parameter(key).grad.norm(), norm, 1e-5, 2e-3, f"{name}: gradient of {key}"
        )
    adapter.requires_grad_(False)


def check_images(model: SdxlDetokenizer, encoder: PlainTower, case_inputs: Tensors, want: Tensors):
    start = case_inputs["pipe.init_latents"]
    source = Image.fromarray(case_inputs["pipe.latent_image_uint8"].numpy())
    side = start.shape[-1] * model.factor
    for name in (name for name in want if name.startswith("pipe.")):
        _, kind, rest = name.split(".", 2)
        case, what = rest.rsplit(".", 1)
        if (kind == "edit") != model.reads_condition:
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
        want.close(name, latents if what == "latents" else model.decode(latents), (1e-4, 1e-3))


@torch.no_grad()
def check_adapter(recording):
    (sizes, weights, case_inputs, want) = recording.case()
    meta = recording.meta
    # A convolution replaces the vision encoder.
    width, _, side, _ = weights["encoder.conv.weight"].shape
    encoder = PlainTower(width, side)
    encoder.load_state_dict(weights.part("encoder"))
    first, second = (build(sizes, weights, stage) for stage in (1, 2))

    # Images of both stages.
    for model in (first, second):
        model.set_null_embeds(encoder, case_inputs["picture"].shape[-1])
        check_images(model, encoder, case_inputs, want)

    # Embeddings, and one step of training of each choice of parameters.
    check_prompts(first, encoder, case_inputs, want)
    check_training(first, "adapter.full_False", meta, case_inputs, want)
    check_training(first, "adapter.full_True", meta, case_inputs, want)
    check_training(second, "latent", meta, case_inputs, want)

    # The second stage starts from the first: its first convolution is widened.
    unet = first.unet
    bias = unet.conv_in.bias.clone()
    SDXLAdapter(unet, first.resampler).add_condition_channels()
    want.close("latent.conv_in_initial", unet.conv_in.weight, (0, 0))
    assert_same(
        unet.config.in_channels, meta["latent.in_channels_config"], "latent.in_channels_config"
    )
    assert_close(unet.conv_in.bias, bias, 0, 0, "the bias, which the original does not copy")


KINDS = {
    "seedx_visual": check_visual,
    "seedx_resamplers": check_resamplers,
    "seedx_sdxl_adapter": check_adapter,
}
# A perceiver that no program of the original uses.
UNREAD = {"seedx_resamplers": ("plain*",)}
