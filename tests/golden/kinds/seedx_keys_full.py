"""Every state-dict key and shape of SEED-X's full-size parts, without allocating a weight (meta device): vision tower,
agent with its language model, both de-tokenizers.

Also: what is trained after construction; the 23 keys of the released agent's file, which lacks the language model; the
SDXL U-Net of diffusers itself, whose table is no part of the fixture. Not checked: the order of the language model's
keys (transformers' own), and its rotary buffers, which transformers no longer keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runner import assert_same, files_named, read_json
from torch import nn

import seed_multimodal  # noqa: F401  (before diffusers)
from seed_multimodal.seed_x.adapter import ResamplerXLV2, SDXLAdapter
from seed_multimodal.seed_x.modeling import ContinuousLVLM
from seed_multimodal.seed_x.vision import INPUT_RESAMPLER, OUTPUT_RESAMPLER, QwenVit, QwenVitConfig, Resampler

KIND = "seedx_keys_full"
Table = dict[str, dict[str, Any]]

# The public unet/config.json of stabilityai/stable-diffusion-xl-base-1.0, where it differs from the class's defaults.
SDXL_UNET = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816, "sample_size": 128, "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True,
}
UNET_KEYS, UNET_PARAMETERS = 1680, 2_567_463_684
KEY_VALUE_PARAMETERS = 545_587_200


def agent() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    llm = LlamaForCausalLM(LlamaConfig(vocab_size=32330, hidden_size=5120, intermediate_size=13824,
                                       num_hidden_layers=40, num_attention_heads=40))
    return ContinuousLVLM(llm, Resampler(INPUT_RESAMPLER), Resampler(OUTPUT_RESAMPLER))


def detokenizer(channels: int = 4) -> SDXLAdapter:
    from diffusers import UNet2DConditionModel

    return SDXLAdapter(UNet2DConditionModel.from_config({**SDXL_UNET, "in_channels": channels}), ResamplerXLV2())


# Table → the module, and the beginning of keys that are another library's: found there, in any order.
BUILD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "visual_encoder.json": (lambda: QwenVit(QwenVitConfig()), "-"),
    "multimodal_model_with_llm.json": (agent, "llm."),
    "detokenizer_resampler.json": (detokenizer, "unet."),
}


def check_keys(module: nn.Module, table: Table, theirs: str, name: str) -> None:
    state = module.state_dict()
    own = [key for key in state if not key.startswith(theirs)]
    assert_same(own, [key for key in table if not key.startswith(theirs)], f"{name}: keys in order")
    kept = {key for key, row in table.items() if not row.get("buffer")}
    if theirs == "llm.":
        assert_same(sorted(state), sorted(kept), f"{name}: keys")
    for key in kept:
        assert_same(list(state[key].shape), table[key]["shape"], f"{name}: shape of {key}")
    trained = {key for key, parameter in module.named_parameters() if parameter.requires_grad}
    assert_same(sorted(trained & kept), sorted(key for key in kept if table[key]["trainable"]), f"{name}: trained")


def check_sdxl(adapter: SDXLAdapter) -> None:
    """The U-Net's keys are diffusers' own: their number and size say that it is the released one's."""
    unet = adapter.unet.state_dict()
    assert_same(len(unet), UNET_KEYS, "keys of the U-Net")
    assert_same(sum(value.numel() for value in unet.values()), UNET_PARAMETERS, "parameters of the U-Net")
    adapter.set_trainable("key_value")
    trained = sum(value.numel() for value in adapter.unet.parameters() if value.requires_grad)
    assert_same(trained, KEY_VALUE_PARAMETERS, "keys and values of the U-Net's attention")
    edits = detokenizer(channels=8).state_dict()
    assert_same(list(edits), list(adapter.state_dict()), "keys of the second stage")
    assert_same(list(edits["unet.conv_in.weight"].shape), [320, 8, 3, 3], "the second stage's first convolution")


def check(folder: Path) -> None:
    files = files_named(folder, "*.json")
    assert files, f"{folder}: no key tables"
    for file in files:
        assert file.name in BUILD, f"{file}: no model is known for this table"
        build, theirs = BUILD[file.name]
        table = read_json(file)
        with torch.device("meta"):
            module = build()
            check_keys(module, table, theirs, file.name)
            if isinstance(module, SDXLAdapter):
                check_sdxl(module)
        if isinstance(module, ContinuousLVLM):
            released = [key for key in module.state_dict() if not key.startswith("llm.")]
            assert_same(len(released), 23, "keys of the released agent's file")
