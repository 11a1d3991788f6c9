"""What the training of LaVIT's pixel decoders begins with: heads that fit the U-Net, and the empty text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_lavit_training import code_decoder, diffusion

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.lavit.diffusion import LavitDetokenizer
from seed_multimodal.lavit.pixel_training import HEADS, TrainedPixels, decoder_for, load_empty_text


def test_a_head_for_the_other_kind_is_new_and_the_rest_stays(tmp_path: Path) -> None:
    high, low = (LavitDetokenizer.load_part(diffusion(tmp_path / head, head), "unet")  # type: ignore[arg-type]
                 for head in ("highres", "lowres"))
    stage1, place = code_decoder(), tmp_path / "decoder"
    stage1.save_pretrained(place)
    same, new = decoder_for(high, place)
    assert not new and all(torch.equal(value, stage1.state_dict()[name]) for name, value in same.state_dict().items())
    other, new = decoder_for(low, place, seed=3)
    assert new and other.config.head == "lowres" and other.unet_proj.out_features == 16
    assert all(torch.equal(value, stage1.state_dict()[name]) for name, value in other.state_dict().items()
               if not name.startswith(HEADS))
    assert torch.equal(decoder_for(low, place, seed=3)[0].unet_proj.weight, other.unet_proj.weight)
    with pytest.raises(ConfigError, match=r"makes conditions \('lowres', 16\), but the U-Net reads \('highres', 16\)"):
        TrainedPixels(high, other)
    (place / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        decoder_for(high, place)


def test_the_empty_text_is_read_or_computed(tmp_path: Path) -> None:
    """By the text encoder of Stable Diffusion's folder, where LaVIT's file is not."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.save(torch.ones(1, 3, 8), tmp_path / "uncond_embeddings.bin")
    assert torch.equal(load_empty_text(tmp_path, 8), torch.ones(1, 3, 8))
    (tmp_path / "uncond_embeddings.bin").unlink()
    with pytest.raises(CheckpointError, match="uncond_embeddings.bin: there is no such file"):
        load_empty_text(tmp_path, 8)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}')
    (tmp_path / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 5}))
    model = CLIPTextModel(CLIPTextConfig(vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2, max_position_embeddings=5, bos_token_id=0,
                                         eos_token_id=1, pad_token_id=1)).eval()
    model.save_pretrained(tmp_path / "text_encoder")
    with torch.no_grad():
        wanted = model(torch.tensor([[0, 1, 1, 1, 1]])).last_hidden_state
    torch.testing.assert_close(load_empty_text(tmp_path, 8), wanted)
