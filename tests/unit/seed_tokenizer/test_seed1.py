"""SEED-1's stage 2 through the same trainer, towards the text features of a tiny text encoder made here."""

from __future__ import annotations

import math

import pytest
import torch
from lavis_runs import log_of, write_text_encoder

from seed_multimodal.errors import CheckpointError


def test_seed1_stage2_trains(yaml, run, tmp_path):
    runner = run(yaml("seed1", f"model.text_encoder={write_text_encoder(tmp_path / 'diffusion')}",
                      "model.load_pretrained=False", "run.max_epoch=1", "run.init_lr=5e-3"))
    lines = log_of(tmp_path / "seed1", "seed1-stage2")
    assert len(lines) == 4 and all(math.isfinite(line["last_loss"]) for line in lines.values())
    assert lines[4]["loss_distil_text"] < lines[1]["loss_distil_text"]
    ids = runner.model.word_ids(["a cat"])
    assert ids.tolist() == [[52, 26, 2, 0, 45, 53, 53, 53, 53]]  # <start> a</w> c a t</w> <end> and padding by <end>
    saved = torch.load(tmp_path / "seed1" / "checkpoint_0.pth", weights_only=True)["model"]
    assert "reverse_tokens" in saved and not any(name.startswith(("text_encoder", "visual_encoder")) for name in saved)


def test_text_encoder_that_is_missing(tmp_path):
    from seed_lavis import register

    register()
    from seed_lavis.compat import registry

    with pytest.raises(CheckpointError, match=r"no complete text encoder.*stable-diffusion-v1-4"):
        registry.get_model_class("seed1_codebook_text").from_config(
            {"text_encoder": str(tmp_path), "load_pretrained": False})
