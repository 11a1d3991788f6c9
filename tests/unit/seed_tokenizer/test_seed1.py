"""SEED-1's stage 2 through the same trainer, towards the text features of a tiny text encoder made here."""

from __future__ import annotations

import json
import math

import pytest
import torch


@pytest.fixture
def text_folder(tmp_path):
    """A diffusion folder's two text parts at tiny size: letters as word pieces."""
    from transformers import CLIPTextConfig, CLIPTextModel

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    place = tmp_path / "diffusion"
    torch.manual_seed(0)
    sizes = CLIPTextConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=9, bos_token_id=52, eos_token_id=53, pad_token_id=53)
    CLIPTextModel(sizes).save_pretrained(place / "text_encoder")
    (place / "tokenizer").mkdir()
    (place / "tokenizer" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (place / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    return place


def test_text_branch_trains(yaml, run, text_folder, tmp_path):
    arguments = yaml("stage2", "model.arch=seed1_codebook_text", "model.load_pretrained=False",
                     f"model.text_encoder={text_folder}", "model.text_tokens=9", "model.text_features_dim=24",
                     "model.reverse_depth=1", "run.max_epoch=1", "run.init_lr=5e-3")
    file = tmp_path / "stage2.yaml"
    kept = [line for line in file.read_text().splitlines() if "clip_model" not in line and "image_features" not in line]
    file.write_text("\n".join(kept))
    runner = run(arguments)
    lines = [json.loads(line) for line in (tmp_path / "stage2" / "seed1-stage2.log.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(math.isfinite(line["last_loss"]) for line in lines)
    assert lines[-1]["loss_distil_text"] < lines[0]["loss_distil_text"]
    ids = runner._model._ids({"caption": ["a cat"]})
    assert ids.tolist() == [[52, 26, 2, 0, 45, 53, 53, 53, 53]]  # <start> a</w> c a t</w> <end> and padding by <end>
    saved = torch.load(tmp_path / "stage2" / "checkpoint_0.pth", weights_only=True)["model"]
    assert "reverse_tokens" in saved and not any(name.startswith(("text_encoder", "visual_encoder")) for name in saved)


def test_a_text_encoder_that_is_not_there_is_one_sentence(tmp_path):
    from omegaconf import OmegaConf
    from seed_lavis import register

    register()
    from seed_lavis.compat import registry

    from seed_multimodal.errors import CheckpointError

    model = registry.get_model_class("seed1_codebook_text")
    with pytest.raises(CheckpointError, match=r"holds no text encoder.*stable-diffusion-v1-4"):
        model.from_config(OmegaConf.create({"text_encoder": str(tmp_path), "load_pretrained": False}))
