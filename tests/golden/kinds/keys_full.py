"""Full-size models on the meta device: names and shapes of the state dict in order, trained
parameters, buffers.

Not compared: dtypes after the originals' partial conversion to half precision (here a model has one
dtype); the CLIP vision encoder of stage 2 (`clip_model.*`, of transformers); the file of each
tensor of SEED-1; in SEED-X the order of the language model's keys (of transformers) and its rotary
buffers, which transformers no longer saves.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from runner import Recording, assert_same
from torch import nn

import seed_multimodal  # noqa: F401  (before diffusers)
from seed_multimodal.models.lavit.decoder import CodeDecoder, LavitDecoderConfig
from seed_multimodal.models.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.models.seed.configuration import Seed1Config, Seed2Config
from seed_multimodal.models.seed.losses import Stage1Model, Stage2Model
from seed_multimodal.models.seed.modeling import Seed1Tokenizer, Seed2Tokenizer
from seed_multimodal.models.seed_x.adapter import ResamplerXLV2, SDXLAdapter
from seed_multimodal.models.seed_x.modeling import ContinuousLVLM
from seed_multimodal.nn.vision.qwen import (
    INPUT_RESAMPLER,
    OUTPUT_RESAMPLER,
    QwenVit,
    QwenVitConfig,
    Resampler,
)

# The public unet/config.json of stabilityai/stable-diffusion-xl-base-1.0, where it differs from the
# class's defaults.
SDXL_UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
UNET = 1680, 2_567_463_684  # keys, parameters
KEY_VALUE_PARAMETERS = 545_587_200


def lavit_tokenizer() -> DynamicTokenizer:
    model = DynamicTokenizer(LavitTokenizerConfig())
    model.encoder.requires_grad_(False)
    return model


def seed_x_agent() -> ContinuousLVLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32330,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
    )
    reads, writes = Resampler(INPUT_RESAMPLER), Resampler(OUTPUT_RESAMPLER)
    return ContinuousLVLM(LlamaForCausalLM(config), reads, writes)


def sdxl_adapter(channels: int = 4) -> SDXLAdapter:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config({**SDXL_UNET, "in_channels": channels})
    return SDXLAdapter(unet, ResamplerXLV2())


# Recorded table → model.
MODELS = {
    "inference_tokenizer.json": lambda: Seed1Tokenizer(Seed1Config()),
    "inference_quantizer.default.json": lambda: Seed2Tokenizer(Seed2Config()),
    "inference_quantizer.use_qformer_image.json": lambda: Seed2Tokenizer(
        Seed2Config(use_qformer_image=True)
    ),
    "stage1_training_model.json": lambda: Stage1Model(Seed2Config()),
    "stage2_training_model.json": lambda: Stage2Model(
        Seed2Config(use_qformer_image=True, reverse_depth=4)
    ),
    "visual_tokenizer.json": lavit_tokenizer,
    "decoder_highres.json": lambda: CodeDecoder(LavitDecoderConfig(head="highres")),
    "decoder_lowres.json": lambda: CodeDecoder(LavitDecoderConfig(head="lowres")),
    "visual_encoder.json": lambda: QwenVit(QwenVitConfig()),
    "multimodal_model_with_llm.json": seed_x_agent,
    "detokenizer_resampler.json": sdxl_adapter,
}
# Beginnings of names of other libraries' parts, whose order is not compared.
OTHERS = ("clip_model.", "llm.", "unet.")
NOT_TRAINED = ("inference_quantizer.default.json", "inference_quantizer.use_qformer_image.json")


def check(recording: Recording) -> None:
    for file in recording.files("*.json"):
        if file.name != "summary.json":
            with torch.device("meta"):
                model = MODELS[file.name]()
                check_keys(file.name, model, recording.json(file.name))
                if file.name == "detokenizer_resampler.json":
                    check_adapter(model)
        else:
            with torch.device("meta"):
                model = Seed1Tokenizer(Seed1Config())
            check_summary(model, recording.json(file.name))


def check_keys(name: str, model: nn.Module, table: dict[str, dict[str, Any]]) -> None:
    def ours(keys: Any) -> list[str]:
        return [key for key in keys if not key.startswith(OTHERS)]

    state = model.state_dict()
    table = {key: row for key, row in table.items() if not key.startswith("clip_model.")}
    assert_same(ours(state), ours(table), f"{name}: keys in order")
    buffers = {key for key, _ in model.named_buffers()} & set(state)
    recorded = [key for key, row in table.items() if row.get("buffer")]
    assert_same(sorted(ours(buffers)), sorted(ours(recorded)), f"{name}: buffers")
    for key, row in table.items():
        if key in state or not row.get("buffer"):
            assert_same(list(state[key].shape), row["shape"], f"{name}: shape of {key}")
    if name == "multimodal_model_with_llm.json":
        assert_same(sorted(state), sorted(table.keys() - set(recorded)), f"{name}: all keys")
    if name not in NOT_TRAINED:
        parameters = dict(model.named_parameters())
        aliases = dict(model.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
        assert_same(
            [key for key in table if key in parameters and parameters[key].requires_grad],
            [key for key in table if table[key].get("trainable") and key not in aliases],
            f"{name}: trained",
        )


def check_summary(model: Seed1Tokenizer, summary: dict[str, Any]) -> None:
    state = model.state_dict()
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[name.partition(".")[0]] += parameter.numel()
    actual = {
        "entries": len(state),
        "buffers": sorted({key for key, _ in model.named_buffers()} & set(state)),
        "parameters_by_module": dict(counts),
        "parameters": counts.total(),
    }
    expected = {**summary, "buffers": sorted(summary["buffers"])}
    assert_same(actual, {key: expected[key] for key in actual}, "summary")


def check_adapter(adapter: SDXLAdapter) -> None:
    """What its table lacks: the U-Net, trained parameters, the second stage."""
    unet = adapter.unet.state_dict()
    assert_same((len(unet), sum(map(torch.numel, unet.values()))), UNET, "the U-Net's keys, sizes")
    adapter.set_trainable("key_value")
    trained = sum(value.numel() for value in adapter.unet.parameters() if value.requires_grad)
    assert_same(trained, KEY_VALUE_PARAMETERS, "keys and values of the U-Net's attention")
    edits = sdxl_adapter(channels=8).state_dict()
    assert_same(list(edits), list(adapter.state_dict()), "keys of the second stage")
    shape = list(edits["unet.conv_in.weight"].shape)
    assert_same(shape, [320, 8, 3, 3], "the second stage's first convolution")


KINDS = dict.fromkeys(
    ("seed1_keys_full", "seed2_keys_full", "seedx_keys_full", "lavit_keys_full"), check
)
