"""Vision encoders: sizes, tokens, CLIP's weights, gradient checkpointing, half precision."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from seed_multimodal.nn.layers import checkpoint_layers, resize_square
from seed_multimodal.nn.vision.base import VisionEncoder
from seed_multimodal.nn.vision.clip import eva_from_clip
from seed_multimodal.nn.vision.eva import EvaConfig, EvaVit
from seed_multimodal.nn.vision.qwen import QwenVit, QwenVitConfig

SMALL = EvaConfig(image_size=16, patch_size=4, width=24, depth=3, heads=3, mlp_width=40)
QWEN = QwenVitConfig(
    image_size=28, width=32, layers=1, heads=2, output_dim=64, n_queries=4, position_grid=2
)


@pytest.mark.parametrize("encoder", [EvaVit(SMALL), QwenVit(QWEN)], ids=["eva", "qwen"])
def test_vision_encoder_sizes_match_its_features(encoder):
    pixels = torch.zeros(2, 3, encoder.image_size, encoder.image_size)
    assert encoder(pixels).shape == (2, encoder.n_tokens, encoder.width)
    assert encoder.n_class_tokens == int(hasattr(encoder, "cls_token"))


def test_vision_encoder_without_sizes_is_not_built():
    class Unsized(VisionEncoder):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images

    with pytest.raises(TypeError):
        Unsized()


def test_a_patch_is_one_token_in_the_order_of_rows():
    embed = EvaVit(SMALL).patch_embed["proj"]
    image = torch.randn(1, 3, 16, 16)
    changed = image.clone()
    changed[..., :4, 4:8] += 1.0  # second patch of the first row
    with torch.no_grad():
        difference = (embed(changed) - embed(image)).abs().sum(1)[0]
    assert difference.nonzero().tolist() == [[0, 1]]


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
    # Without the norm before the first layer the features are others.
    without = EvaVit(SMALL)
    without.load_state_dict(eva_from_clip(state, 3, pre_norm=False))
    assert (without(images) - expected).abs().max() > 0.1


@pytest.mark.parametrize("kernel", [None, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=str)
def test_gradient_checkpointing_changes_no_gradient(kernel):
    """Also if the attention kernel is chosen for the forward pass only."""
    plain = EvaVit(SMALL)
    saving = EvaVit(dataclasses.replace(SMALL, grad_checkpoint=True))
    saving.load_state_dict(plain.state_dict())
    later = copy.deepcopy(plain)
    for _ in range(2):  # applied twice
        checkpoint_layers(later)
    image = torch.randn(2, 3, 16, 16)
    runs: Counter[EvaVit] = Counter()
    for vit in (plain, saving, later):
        vit.blocks[1].norm1.register_forward_hook(lambda *_, vit=vit: runs.update([vit]))
        with nullcontext() if kernel is None else sdpa_kernel(kernel):
            loss = vit(image).square().mean()
        loss.backward()
    assert [runs[vit] for vit in (plain, saving, later)] == [1, 2, 2]
    for vit in (saving, later):
        for got, expected in zip(vit.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad)
    with torch.no_grad():
        assert torch.equal(saving(image), plain(image))
    assert runs[saving] == 3


def test_resize_square_of_another_grid():
    table = torch.randn(16, 8)
    assert torch.equal(resize_square(table, 4), table)
    torch.testing.assert_close(resize_square(torch.full((16, 8), 3.0), 7), torch.full((49, 8), 3.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_forward_in_half_precision(dtype):
    # As on a GPU: no sum overflows.
    vit = EvaVit(SMALL).eval()
    image = torch.randn(2, 3, 16, 16)
    expected = vit(image)
    half = vit.to(dtype)(image.to(dtype))
    assert half.dtype == dtype
    assert (half.float() - expected).abs().max() < 0.05
