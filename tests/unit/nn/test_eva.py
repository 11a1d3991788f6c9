"""Vision encoders: sizes, tokens, CLIP's weights, gradient checkpointing."""

import dataclasses
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from seed_multimodal.nn.vision.clip import eva_from_clip
from seed_multimodal.nn.vision.eva import EvaConfig, EvaVit

SMALL = EvaConfig(image_size=16, patch_size=4, width=24, depth=3, heads=3, mlp_width=40)


@torch.no_grad()
def test_eva_from_clip_gives_clips_output():
    # Weights published for one class are read by the other.
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=16,
        patch_size=4,
        projection_dim=8,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    clip = CLIPVisionModelWithProjection(config).eval()
    for value in clip.parameters():
        value.add_(torch.randn_like(value) * 0.2)
    state = clip.state_dict()
    vit = EvaVit(dataclasses.replace(SMALL, pre_norm=True))
    vit.load_state_dict(eva_from_clip(state, vit.config.depth))
    images = torch.randn(5, 3, 16, 16)
    expected = clip.vision_model(images).last_hidden_state
    torch.testing.assert_close(vit(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [None, SDPBackend.MATH], ids=str)
def test_gradient_checkpointing_changes_no_gradient(kernel):
    # Also if the attention kernel is chosen for the forward pass only.
    plain = EvaVit(SMALL)
    saving = EvaVit(dataclasses.replace(SMALL, grad_checkpoint=True))
    saving.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 16, 16)
    runs = Counter()
    for vit in (plain, saving):
        vit.blocks[1].norm1.register_forward_hook(lambda *_, vit=vit: runs.update([vit]))
        with nullcontext() if kernel is None else sdpa_kernel(kernel):
            loss = vit(image).square().mean()
        loss.backward()
    assert (runs[plain], runs[saving]) == (1, 2)
    for got, expected in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)
