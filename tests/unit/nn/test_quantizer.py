"""Quantizers: nearest codes, losses and gradients, moving averages, k-means, restarts."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.quantizer import VectorQuantizer, build_quantizer

# What the codebook's users build: SEED, SEED with moving averages, normalised codes, LaVIT.
KINDS = {
    "plain": {},
    "average": {"ema_decay": 0.5},
    "normalized": {"normalize": True},
    "unit rows": {"unit_rows": True, "ema_decay": 0.5},
}


def distances(features: Tensor, codes: Tensor) -> Tensor:
    """Squared distances `[..., K]` without the trick of inner products."""
    return (features[..., None, :] - codes).square().sum(-1)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 1000), size=st.integers(1, 12), sections=st.integers(1, 3))
@example(seed=0, size=5, sections=3)
def test_nearest_equals_brute_force(kind, seed, size, sections):
    # Another nearest code is another image: every kind, in whole and divided codebooks.
    torch.manual_seed(seed)
    quantizer = VectorQuantizer(size * sections, 3, sections=sections, **KINDS[kind])
    torch.nn.init.normal_(quantizer.embedding.weight)
    features = torch.randn(4, sections, 3)
    codes = quantizer.nearest(features)

    points = quantizer.prepare(features)
    rows = quantizer.lookup(torch.arange(quantizer.size)).unflatten(0, (sections, size))
    for section in range(sections):
        expected = distances(points[:, section], rows[section]).argmin(-1) + size * section
        assert torch.equal(codes[:, section], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearest_computes_in_float32(dtype):
    # Under autocast, or with weights in half precision, one code in a few would be another.
    quantizer = VectorQuantizer(512, 16)
    torch.nn.init.normal_(quantizer.embedding.weight)
    quantizer.to(dtype)
    features = torch.randn(64, 32, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = quantizer.nearest(features)
    expected = distances(features.float(), quantizer.embedding.weight.float()).argmin(-1)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_loss_and_gradients(kind):
    # The original's weights of both terms; another gradient trains another tokenizer.
    quantizer = VectorQuantizer(10, 4, **KINDS[kind]).eval()
    z = torch.randn(2, 3, 4, requires_grad=True)
    quantized, loss, codes = quantizer(z)
    assert torch.equal(codes, quantizer.nearest(z))
    rows = quantizer.lookup(codes)
    assert_close(quantized, rows)

    # 1. Commitment, and the codebook's term unless codes follow an average.
    is_averaged = "ema_decay" in KINDS[kind]
    weight = 1.0 if is_averaged else 1.25
    assert_close(loss, weight * F.mse_loss(quantizer.prepare(z), rows))
    assert quantizer.embedding.weight.requires_grad is not is_averaged
    loss.backward()
    if not is_averaged:
        moved = quantizer.embedding.weight.grad.abs().sum(1).nonzero().flatten()
        assert set(moved.tolist()) == set(codes.flatten().tolist())

    # 2. The codes have the features' gradient.
    [straight] = torch.autograd.grad(quantizer(z)[0].square().sum(), z)
    features = quantizer.prepare(z)
    [expected] = torch.autograd.grad(features, z, 2 * rows.detach())
    assert_close(straight, expected)


@pytest.mark.parametrize("kind", ["average", "unit rows"])
def test_moving_average_of_a_few_steps(kind):
    # One training step after the other, against the formula of van den Oord et al. (2017). Two
    # micro-batches are one step, and activation checkpointing counts them once.
    quantizer = VectorQuantizer(4, 3, **KINDS[kind]).train()
    count = torch.zeros(4)
    total = torch.zeros(4, 3)
    codebook = quantizer.embedding.weight.clone()
    for _ in range(3):
        features = torch.randn(2, 5, 3, requires_grad=True)
        for part in features.chunk(2):
            quantized, _, _ = checkpoint(quantizer, part, use_reentrant=kind == "average")
            quantized.sum().backward()
        codes = quantizer.nearest(features)
        points = quantizer.prepare(features.detach())
        assert torch.equal(quantizer.update(), codes.flatten().bincount(minlength=4))
        one_hot = F.one_hot(codes, 4).float().flatten(0, 1)
        count = 0.5 * count + 0.5 * one_hot.sum(0)
        total = 0.5 * total + 0.5 * one_hot.T @ points.flatten(0, 1)
        used = count > 0
        codebook[used] = total[used] / count[used, None]
        if kind == "unit rows":
            codebook = F.normalize(codebook, dim=-1)
        assert_close(quantizer.embedding.weight, codebook)
    quantizer.eval()(torch.randn(1, 5, 3))
    assert not quantizer.update().any()
    assert_close(quantizer.embedding.weight, codebook)


@pytest.mark.parametrize("kind", KINDS)
def test_init_from_finds_the_clusters(kind):
    centres = torch.randn(12, 1, 6) * 5
    points = (centres + 0.05 * torch.randn(12, 30, 6)).flatten(0, 1)
    quantizer = VectorQuantizer(24, 6, **KINDS[kind]).eval()
    quantizer.init_from(points[torch.randperm(len(points))].reshape(6, -1, 6), iterations=20)
    quantized, _, codes = quantizer(points[None])
    features = quantizer.prepare(points)
    assert F.mse_loss(quantized[0], features) < 0.05 * features.var()
    assert len(codes.unique()) >= 12


@pytest.mark.parametrize("n_points", [1, 20, 33, 200])
def test_init_from_distinct_points(n_points):
    # Equal codes would die at once: of repeated features each is used once, or gets noise.
    points = torch.randn(n_points, 4).repeat(9, 1)
    quantizer = VectorQuantizer(32, 4)
    quantizer.init_from(points)
    rows = quantizer.embedding.weight
    assert rows.isfinite().all() and len(rows.unique(dim=0)) == 32


@pytest.mark.parametrize("kind", KINDS)
@given(dead=st.lists(st.booleans(), min_size=8, max_size=8), n_points=st.integers(1, 20))
def test_restart_moves_dead_codes_onto_features(kind, dead, n_points):
    # A code that is in use must keep its meaning; a dead one gets features of its own section.
    quantizer = VectorQuantizer(8, 3, sections=2, **KINDS[kind])
    before = quantizer.embedding.weight.detach().clone()
    is_dead = torch.tensor(dead)
    features = 5 + torch.randn(n_points, 2, 3)
    quantizer.restart(is_dead, features)
    after = quantizer.embedding.weight.detach()
    assert torch.equal((after != before).any(1), is_dead)

    points = quantizer.prepare(features)
    assert len(after.unique(dim=0)) == 8
    for section in (0, 1):
        moved = after[4 * section :][:4][is_dead[4 * section :][:4]]
        nearest = distances(moved, points[:, section]).amin(-1)
        # If there are too few features, the others get noise.
        assert int((nearest < 1e-6).sum()) >= min(n_points, len(moved))
    if "ema_decay" in KINDS[kind]:  # the average begins anew, as of one feature
        assert_close(quantizer.ema_count, is_dead.float())
        assert_close(quantizer.ema_sum[is_dead], after[is_dead])


# ---- codes that are not learned


def rounded(z: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
    """FSQ of a vector by the paper's formula: values in [-1, 1] and the code."""
    values, code = [], 0
    for number, level in zip(z.tolist(), levels, strict=True):
        half = (level - 1) * 1.001 / 2
        offset = 0.0 if level % 2 else 0.5
        bounded = math.tanh(number + math.atanh(offset / half)) * half - offset
        digit = round(bounded) + level // 2
        values.append((digit - level // 2) / (level // 2))
        code = code * level + digit
    return torch.tensor(values), torch.tensor(code)


def signed(z: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
    """LFQ of a vector: signs, and the number that they write."""
    bits = (z > 0).long()
    return 2.0 * bits - 1, (bits * 2 ** torch.arange(len(z)).flip(0)).sum()


FIXED = {"fsq": ([5, 4, 3, 2], rounded), "lfq": ([2] * 5, signed)}


def build_fixed(kind: str, sections: int = 1, **options) -> VectorQuantizer:
    levels = FIXED[kind][0]
    size = math.prod(levels) * sections
    if kind == "fsq":
        options["levels"] = levels
    return build_quantizer(kind, size, len(levels), sections=sections, **options)


@pytest.mark.parametrize("sections", [1, 3])
@pytest.mark.parametrize("kind", FIXED)
def test_fixed_codes_equal_the_papers_formulas(kind, sections):
    # Another code of a vector, or another vector of a code, is another image.
    levels, quantize = FIXED[kind]
    quantizer = build_fixed(kind, sections).train()
    z = 3 * torch.randn(200, sections, len(levels))
    rows, loss, codes = quantizer(z.requires_grad_())
    per_section = quantizer.size // sections
    for position in range(sections):
        for vector, row, code in zip(
            z[:, position], rows[:, position], codes[:, position], strict=True
        ):
            expected_row, expected_code = quantize(vector, levels)
            assert_close(row, expected_row)
            assert code == expected_code + position * per_section

    # 1. No two codes of a section have one vector.
    every = torch.arange(quantizer.size).reshape(sections, -1)
    assert all(len(quantizer.lookup(row).unique(dim=0)) == per_section for row in every)

    # 2. The codes have the features' gradient, and are not learned.
    [straight] = torch.autograd.grad(rows.sum(), z, retain_graph=True)
    [expected] = torch.autograd.grad(quantizer.prepare(z).sum(), z)
    assert_close(straight, expected)
    assert expected.abs().max() > 0
    assert not quantizer.embedding.weight.requires_grad
    assert int(quantizer.update().sum()) == 200 * sections


def test_lfq_loss_equals_the_entropies_of_all_codes():
    # By the probabilities of all codes, as in the paper; a flipped sign would use one code only.
    quantizer = build_fixed("lfq")
    z = torch.randn(50, 5)
    rows, loss, _ = quantizer(z)
    table = quantizer.lookup(torch.arange(32))
    p = (-distances(z, table)).softmax(-1)  # [50, 32]
    of_each = -(p * p.log()).sum(-1).mean()
    bits = [(p * (table[:, k] > 0)).sum(-1).mean() for k in range(5)]
    of_all = sum(-(b * b.log() + (1 - b) * (1 - b).log()) for b in bits)
    assert_close(loss, 0.25 * F.mse_loss(z, rows) + 0.1 * (of_each - of_all))
    assert quantizer(torch.ones(50, 5))[1] > quantizer(z.sign())[1]

    # BSQ: on the sphere, where no term is infinite or NaN.
    sphere = build_fixed("lfq", normalize=True)
    z = (100 * torch.eye(5)).requires_grad_()
    rows, loss, codes = sphere(z)
    assert_close(rows.norm(dim=-1), torch.ones(5))
    [gradient] = torch.autograd.grad(loss, z)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "size", "options", "named"),
    [
        ("fsq", 60, {"levels": (5, 4, 4)}, "codebook_size is 60"),
        ("fsq", 20, {"levels": (5, 4)}, "fsq_levels"),
        ("fsq", 80, {"levels": (5, 4, 4), "normalize": True}, "normalize_codes"),
        ("lfq", 10, {}, "codebook_size is 10"),
        ("lfq", 8, {"levels": (2, 2, 2)}, "fsq_levels"),
        ("vq", 8, {"levels": (2, 2, 2)}, "fsq_levels"),
    ],
)
def test_build_quantizer_refuses_settings_that_do_not_fit(kind, size, options, named):
    with pytest.raises(ConfigError, match=named):
        build_quantizer(kind, size, 3, **options)
