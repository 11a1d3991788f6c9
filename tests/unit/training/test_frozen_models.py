"""Divergence of label heads, and loading them."""

from __future__ import annotations

import torch
from torch.distributions import Categorical, kl_divergence

from seed_multimodal.models.seed.losses import label_divergence
from seed_multimodal.nn.label_heads import LabelHeads
from seed_multimodal.training.frozen_models import load_label_heads
from seed_multimodal.weights import save_state_dict


def test_label_divergence_equals_torchs_and_trains_the_student_only(tmp_path):
    # With heads that were read from a file, in half precision.
    heads = LabelHeads(4, {"style": 3, "layout": 5})
    file = tmp_path / "heads.safetensors"
    save_state_dict(heads.state_dict(), file)
    loaded = load_label_heads(file, ("style", "layout"))
    student, teacher = (torch.randn(8, 4, requires_grad=True) for _ in range(2))
    expected = [
        kl_divergence(*(Categorical(logits=heads(values)[name]) for values in (teacher, student)))
        for name in heads.classes
    ]
    with torch.autocast("cpu", torch.bfloat16):
        divergence = label_divergence(loaded, student, teacher)
    torch.testing.assert_close(divergence, torch.stack(expected).mean(0), rtol=1e-5, atol=1e-6)
    divergence.mean().backward()
    assert float(student.grad.abs().sum()) > 0
    assert teacher.grad is None
