"""LaVIT's dynamic tokenizer at a tiny size: token merger, token selector, codes, continuous
features.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny.lavit import SMALL, small_tokenizer
from torch import Tensor

from seed_multimodal.models.lavit.modeling import (
    DynamicTokenizer,
    TokenMerger,
    choose,
    gumbel_noise,
    masked_softmax,
)
from seed_multimodal.nn.layers import cast_layers

IMAGES = 4
PATCHES = 16
WIDTH = 16


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def model() -> DynamicTokenizer:
    return small_tokenizer()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def log_probs() -> Tensor:
    return F.log_softmax(
        2 * torch.randn(IMAGES, PATCHES, 2, generator=torch.Generator().manual_seed(2)), -1
    )


# ---- token merger


def test_masked_softmax():
    scores = 3 * torch.randn(2, 3, 5, 5)
    allowed = torch.tensor([1.0, 0, 1, 1, 0])
    e = (scores - scores.amax(-1, keepdim=True)).exp() * allowed
    assert torch.allclose(
        masked_softmax(scores, allowed),
        (e + 1e-6 / 5) / (e.sum(-1, keepdim=True) + 1e-6),
        atol=1e-7,
    )
    assert torch.allclose(masked_softmax(scores, torch.zeros(5)), torch.full_like(scores, 0.2))


def changed(features: Tensor, patch: int) -> Tensor:
    other = features.clone()
    other[:, patch] += torch.randn(WIDTH)
    return other


@torch.no_grad()
def test_token_merger_attends_causally_and_to_dropped_patches():
    merger = TokenMerger(SMALL, SMALL.vit.width).eval()
    features = torch.randn(2, PATCHES, WIDTH)
    keep = torch.ones(2, PATCHES)
    keep[:, [3, 7]] = 0
    selected = keep[0] > 0
    before = merger(features, keep)
    later = merger(changed(features, 9), keep)
    dropped = merger(changed(features, 7), keep)
    assert (before - later)[:, :9].abs().max() < 1e-5 and (before - later)[:, 9:].abs().amax(
        2
    ).min() > 1e-3
    assert (before - dropped)[:, selected].abs().amax(2).min() > 1e-3
    for block in merger.blocks:
        block.token_cross_attn.value.weight.zero_()
    assert (merger(features, keep) - merger(changed(features, 7), keep))[
        :, selected
    ].abs().max() < 1e-5


# ---- token selector


def test_choose_equals_gumbel_softmax(log_probs: Tensor):
    torch.manual_seed(7)
    keep = choose(log_probs).keep_BN
    torch.manual_seed(7)
    assert torch.equal(keep, F.gumbel_softmax(log_probs, tau=1, hard=True)[..., 0].round())


@pytest.mark.parametrize("mode", ["draw", "threshold"])
def test_choose_keeps_a_patch_of_each_image(mode):
    p = torch.full((2, PATCHES), 1e-12)
    p[0, 5], p[1, 2] = 1e-9, 0.9999999
    keep = choose(
        torch.stack([p.log(), (1 - p).log()], -1), mode=mode, generator=generators(0)[0]
    ).keep_BN
    assert keep.nonzero().tolist() == [[0, 5], [1, 2]]


@pytest.mark.parametrize("mode", ["draw", "threshold"])
def test_choose_has_the_gradient_of_soft_decisions(mode, log_probs: Tensor):
    noise = gumbel_noise(log_probs.shape, log_probs.device, generators(4)[0])
    logits = log_probs.clone().requires_grad_()
    soft = log_probs.clone().requires_grad_()
    keep = choose(logits, mode=mode, noise=noise).keep_BN
    value = (soft + noise).softmax(-1)[..., 0] if mode == "draw" else soft[..., 0].exp()
    assert torch.equal(keep, (value > 0.5).float())
    weights = torch.randn(IMAGES, PATCHES)
    (keep * weights).sum().backward()
    (value * weights).sum().backward()
    assert torch.allclose(logits.grad, soft.grad, atol=1e-6)


# ---- images to features and codes


@pytest.mark.parametrize("mode", ["threshold", "draw"])
def test_encode_does_not_depend_on_batches(mode, model: DynamicTokenizer, pixels: Tensor):
    def options(*seeds: int) -> dict[str, object]:
        return {"mode": mode, "generator": generators(*seeds)}

    codes = model.encode(pixels, **options(*range(IMAGES)))
    rows = model.continuous(pixels, **options(*range(IMAGES)))
    assert len(set(map(len, codes))) > 1, "the images should differ in their number of tokens"
    for i in range(IMAGES):
        assert torch.equal(model.encode(pixels[i : i + 1], **options(i))[0], codes[i])
        assert torch.allclose(
            model.continuous(pixels[i : i + 1], **options(i))[0], rows[i], atol=1e-5
        )
        assert rows[i].shape == (len(codes[i]), SMALL.llm_width)


# ---- precision


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_an_fp32_residual_stream(
    dtype, model: DynamicTokenizer, pixels: Tensor
):
    half = cast_layers(small_tokenizer(), dtype)
    features = half.patch_features(pixels)
    want = model.patch_features(pixels)
    assert (
        features.dtype == torch.float32 and (features - want).abs().max() < 0.02 * want.abs().max()
    )
    assert not torch.equal(features, features.to(dtype).float()), "the residual stream was rounded"
    keep = model.select(want, mode="threshold").keep_BN
    merged = half.merge(want, keep)
    exact = model.merge(want, keep)
    assert merged.dtype == torch.float32 and (merged - exact).abs().max() < 0.05 * exact.abs().max()
    assert half.continuous(pixels, mode="threshold")[0].dtype == dtype
