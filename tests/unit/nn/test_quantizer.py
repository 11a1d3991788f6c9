"""Vector quantizer: nearest code, gradients, k-means, restart, cosine codes, moving average."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from seed_multimodal.nn.quantizer import VectorQuantizer


def _clusters(count: int, dim: int, each: int) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(count, dim) * 5
    return centres, (centres[:, None] + 0.05 * torch.randn(count, each, dim)).flatten(0, 1)


def test_nearest_equals_brute_force_and_takes_the_first_of_a_tie():
    quantizer = VectorQuantizer(40, 5)
    z = torch.randn(3, 7, 5) * 0.02
    brute = (z[..., None, :] - quantizer.embedding.weight).square().sum(-1).argmin(-1)
    assert torch.equal(quantizer.nearest(z), brute)
    with torch.no_grad():
        quantizer.embedding.weight[11] = quantizer.embedding.weight[3] = torch.tensor([9.0] * 5)
    assert int(quantizer.nearest(torch.full((5,), 9.0))) == 3


def test_nearest_computes_in_fp32_under_autocast_and_for_half_weights():
    quantizer = VectorQuantizer(512, 16)
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(64, 32, 16)
    exact = quantizer.nearest(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.nearest(z), exact)
    half = VectorQuantizer(512, 16).to(torch.bfloat16)
    half.embedding.weight.data.copy_(quantizer.embedding.weight)
    rows = half.embedding.weight.float()
    points = z.bfloat16()
    brute = torch.cdist(
        points.float().flatten(0, 1), rows, compute_mode="donot_use_mm_for_euclid_dist"
    ).argmin(1)
    assert torch.equal(half.nearest(points).flatten(), brute)


def test_forward_loss_and_straight_through_gradient():
    quantizer = VectorQuantizer(10, 4)
    z = torch.randn(2, 3, 4, requires_grad=True)
    quant, loss, indices = quantizer(z)
    rows = quantizer.embedding.weight[indices]
    torch.testing.assert_close(quant, rows)
    torch.testing.assert_close(loss, 1.25 * F.mse_loss(z, rows))
    loss.backward()
    torch.testing.assert_close(z.grad, 2 * (z - rows).detach() / z.numel())
    assert set(quantizer.embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist()) == set(
        indices.flatten().tolist()
    )
    z.grad = None
    quantizer(z)[0].sum().backward()
    torch.testing.assert_close(z.grad, torch.ones_like(z))


def test_init_from_finds_the_clusters():
    centres, points = _clusters(12, 6, 30)
    quantizer = VectorQuantizer(24, 6)
    before = F.mse_loss(quantizer.lookup(quantizer.nearest(points)), points)
    quantizer.init_from(points[torch.randperm(len(points))].reshape(6, -1, 6), iterations=20)
    after = F.mse_loss(quantizer.lookup(quantizer.nearest(points)), points)
    assert after < 0.02 * before
    assert len(quantizer.nearest(points).unique()) >= 12


def test_init_from_is_reproducible_with_fewer_points_than_codes():
    points = torch.randn(20, 4)
    tables = []
    for _ in range(2):
        quantizer = VectorQuantizer(32, 4)
        torch.manual_seed(3)
        quantizer.init_from(points)
        tables.append(quantizer.embedding.weight.detach().clone())
    assert torch.equal(*tables)
    assert tables[0].isfinite().all() and len(tables[0].unique(dim=0)) >= 20


def test_restart_moves_dead_codes_only():
    quantizer = VectorQuantizer(8, 3)
    before = (torch.arange(8.0)[:, None] * 10).expand(8, 3)
    quantizer.embedding.weight.data.copy_(before)
    features = torch.tensor([1.0, 21.0, 71.0])[:, None].expand(3, 3)
    dead = torch.tensor([False, True, False, True, True, False, False, False])
    quantizer.restart(dead, features)
    assert torch.equal((quantizer.embedding.weight != before).any(1), dead)
    assert sorted(quantizer.embedding.weight[dead][:, 0].tolist()) == [1, 21, 71]


def test_normalized_codes_ignore_length():
    quantizer = VectorQuantizer(16, 4, normalize=True)
    z = torch.randn(5, 4)
    assert torch.equal(quantizer.nearest(z), quantizer.nearest(z * 100))
    torch.testing.assert_close(quantizer.lookup(torch.arange(16)).norm(dim=-1), torch.ones(16))
    quant, _, indices = quantizer(z)
    torch.testing.assert_close(quant, quantizer.lookup(indices))


def test_moving_average_follows_features_without_gradient():
    centres, points = _clusters(4, 3, 50)
    quantizer = VectorQuantizer(4, 3, ema_decay=0.5).train()
    assert not quantizer.embedding.weight.requires_grad
    quantizer.init_from(points[::50] + 0.5, iterations=0)
    for _ in range(12):
        quantizer(points[None])
    assert torch.cdist(centres, quantizer.embedding.weight).min(1).values.max() < 0.05
    _, loss, indices = quantizer.eval()(points[None])
    torch.testing.assert_close(loss, F.mse_loss(points[None], quantizer.embedding.weight[indices]))


def test_sections_divide_the_codes_among_positions():
    torch.manual_seed(5)
    quantizer = VectorQuantizer(24, 4, sections=6).train()
    points = torch.randn(200, 6, 4) + 3.0 * torch.randn(6, 4)
    quantizer.init_from(points)
    _, _, codes = quantizer(points)
    first = torch.arange(6) * 4
    assert bool(((codes >= first) & (codes < first + 4)).all())
    for position in range(6):  # the nearest code of the section
        rows = quantizer.embedding.weight[position * 4 : position * 4 + 4]
        assert torch.equal(
            codes[:, position] - position * 4, torch.cdist(points[:, position], rows).argmin(1)
        )
    quantizer.restart(torch.arange(24) // 4 == 2, points)  # onto features of that position
    moved = quantizer.embedding.weight[8:12]
    assert bool((torch.cdist(moved, points[:, 2]).min(1).values < 1e-6).all())


@torch.no_grad()
def test_unit_rows_stay_on_the_sphere():
    quantizer = VectorQuantizer(6, 4, unit_rows=True, ema_decay=0.5)
    lengths = [quantizer.embedding.weight.norm(dim=1)]
    quantizer.init_from(3 * torch.randn(200, 4))
    lengths.append(quantizer.embedding.weight.norm(dim=1))
    quantizer.train()(torch.randn(2, 30, 4))
    lengths.append(quantizer.embedding.weight.norm(dim=1))
    quantizer.restart(torch.ones(6, dtype=torch.bool), 5 * torch.randn(50, 4))
    lengths.append(quantizer.embedding.weight.norm(dim=1))
    assert all(torch.allclose(norms, torch.ones(6), atol=1e-5) for norms in lengths)
    quantizer.embedding.weight[2] *= 3
    z = torch.randn(40, 4)
    near = torch.cdist(F.normalize(z, dim=-1), quantizer.embedding.weight).argmin(1)
    assert torch.equal(quantizer.nearest(z), near)
    assert torch.equal(quantizer.lookup(near), quantizer.embedding.weight[near])
