"""What LaVIT's pixel decoders begin with: heads that fit the U-Net, the empty text, and the memory of a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lavit_training import code_decoder, diffusion

from seed_multimodal.detokenizers.lavit_training import (
    HEADS,
    TrainedPixels,
    decoder_for,
    empty_text_of,
    read_unet,
)
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.lavit.decoder import CodeDecoder
from seed_multimodal.training.llm.memory import GIB
from seed_multimodal.training.pixel_decoder.memory import held_memory

# The public unet/config.json of SDXL base 1.0, where it differs from the class's defaults.
SDXL_UNET = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816, "sample_size": 128, "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True}


def test_a_head_for_the_other_kind_is_new_and_the_rest_stays(tmp_path: Path) -> None:
    unets = {head: read_unet(diffusion(tmp_path / head, head)) for head in ("highres", "lowres")}  # type: ignore[arg-type]
    stage1 = code_decoder()
    stage1.save_pretrained(tmp_path / "decoder")
    same, new = decoder_for(unets["highres"], tmp_path / "decoder")
    assert not new and all(torch.equal(value, stage1.state_dict()[name]) for name, value in same.state_dict().items())
    other, new = decoder_for(unets["lowres"], tmp_path / "decoder", seed=3)
    assert new and other.config.head == "lowres" and other.unet_proj.out_features == 14
    assert all(torch.equal(value, stage1.state_dict()[name]) for name, value in other.state_dict().items()
               if not name.startswith(HEADS))
    assert torch.equal(decoder_for(unets["lowres"], tmp_path / "decoder", seed=3)[0].unet_proj.weight,
                       other.unet_proj.weight)
    with pytest.raises(ConfigError, match="makes prompts of width 14, but the U-Net reads prompts of width 16 and"):
        TrainedPixels(unets["highres"], other)
    (tmp_path / "decoder" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        decoder_for(unets["highres"], tmp_path / "decoder")


def test_the_empty_text_is_kept_or_made(tmp_path: Path) -> None:
    """By the text encoder of Stable Diffusion's folder, where LaVIT's file is not."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.save(torch.ones(1, 3, 8), tmp_path / "uncond_embeddings.bin")
    assert torch.equal(empty_text_of(tmp_path, 8), torch.ones(1, 3, 8))
    (tmp_path / "uncond_embeddings.bin").unlink()
    with pytest.raises(CheckpointError, match="uncond_embeddings.bin: there is no such file"):
        empty_text_of(tmp_path, 8)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 5}))
    model = CLIPTextModel(CLIPTextConfig(vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2, max_position_embeddings=5, bos_token_id=0,
                                         eos_token_id=1, pad_token_id=1)).eval()
    model.save_pretrained(tmp_path / "text_encoder")
    with torch.no_grad():
        wanted = model(torch.tensor([[0, 1, 1, 1, 1]])).last_hidden_state
    torch.testing.assert_close(empty_text_of(tmp_path, 8), wanted)


def test_the_released_sizes_in_memory() -> None:
    """On the meta device, without activations: all of the larger U-Net on one GPU of 80 GB, or a part on each of 8 with
    ZeRO 2; keys and values alone on one of 40 GB."""
    from diffusers import UNet2DConditionModel

    unet: Any = None
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**SDXL_UNET, "in_channels": 4})
        model = TrainedPixels(unet, CodeDecoder())
        model.set_trainable("all")
        whole = held_memory(model)
        spread = held_memory(model, world=8, deepspeed={"zero_optimization": {"stage": 2}})
        model.set_trainable("key_value")
        small = held_memory(model)
    assert 38 < whole.total / GIB < 48 and spread.total / GIB < 12 and small.total / GIB < 19
