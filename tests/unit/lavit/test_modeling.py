"""LaVIT's dynamic tokenizer at a tiny size (token merger, selector and codes as recorded: golden
kind `lavit_tokenizer`)."""

import pytest
import torch
import torch.nn.functional as F
from tensors import normal
from tiny.lavit import small_tokenizer
from torch import Tensor

from seed_multimodal.models.lavit.modeling import choose, gumbel_noise
from seed_multimodal.nn.layers import cast_layers

IMAGES = 4
PATCHES = 16
MODES = ["threshold", "draw"]


def generator(seed) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pixels() -> Tensor:
    return normal(1, IMAGES, 3, 16, 16)


@pytest.fixture
def log_probs() -> Tensor:
    return F.log_softmax(2 * normal(2, IMAGES, PATCHES, 2), -1)


def test_choose_draws_as_gumbel_softmax(log_probs):
    # With torch's seed the selection is the original's, which calls this function.
    torch.manual_seed(7)
    keep = choose(log_probs).keep_BN
    torch.manual_seed(7)
    assert torch.equal(keep, F.gumbel_softmax(log_probs, tau=1, hard=True)[..., 0].round())


@pytest.mark.parametrize("mode", MODES)
def test_choose_keeps_a_patch_of_each_image(mode):
    # An image without tokens could neither be read nor drawn.
    p = torch.full((2, PATCHES), 1e-12)
    p[0, 5], p[1, 2] = 1e-9, 0.9999999
    log_probs = torch.stack([p.log(), (1 - p).log()], -1)
    keep = choose(log_probs, mode=mode, generator=generator(0)).keep_BN
    assert keep.nonzero().tolist() == [[0, 5], [1, 2]]


@pytest.mark.parametrize("mode", MODES)
def test_choose_has_the_gradient_of_soft_decisions(mode, log_probs):
    # Straight through: hard decisions forward, soft ones backward.
    noise = gumbel_noise(log_probs.shape, log_probs.device, generator(4))
    logits = log_probs.clone().requires_grad_()
    soft = log_probs.clone().requires_grad_()
    keep = choose(logits, mode=mode, noise=noise).keep_BN
    value = (soft + noise).softmax(-1)[..., 0] if mode == "draw" else soft[..., 0].exp()
    assert torch.equal(keep, (value > 0.5).float())
    weights = torch.randn(IMAGES, PATCHES)
    (keep * weights).sum().backward()
    (value * weights).sum().backward()
    torch.testing.assert_close(logits.grad, soft.grad, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_an_fp32_residual_stream(dtype, pixels):
    # Rounded between the layers, other patches would be kept.
    model = small_tokenizer()
    half = cast_layers(small_tokenizer(), dtype)
    exact = model.patch_features(pixels)
    keep = model.select(exact, mode="threshold").keep_BN
    for computed, expected in (
        (half.patch_features(pixels), exact),
        (half.merge(exact, keep), model.merge(exact, keep)),
    ):
        assert computed.dtype == torch.float32
        assert (computed - expected).abs().max() < 0.05 * expected.abs().max()
        assert not torch.equal(computed, computed.to(dtype).float()), "the stream was rounded"
    assert half.project(exact, keep)[0].dtype == dtype
