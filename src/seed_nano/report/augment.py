"""Random changes of the judge's training pictures, so that rebuilt pictures lie inside its training distribution.

Rebuilt and drawn pictures are shifted, blurred, tinted, speckled and blocky copies of real ones; each change below
imitates one of these, with random strength, on a part of the batch. Pictures are never mirrored: labels say left and
right. Everything comes from one generator, so a step can be repeated exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from seed_nano.report.judge import shrink


@torch.autocast("cpu", enabled=False)
def augment(pixels: Tensor, size: int, generator: Generator) -> Tensor:
    """uint8 [B, 3, H, W] → float32 [B, 3, size, size] in -1..1, randomly changed (all draws from `generator`)."""
    x = shrink(pixels.float() / 127.5 - 1, size)
    x = _some(x, _affine, 0.3, generator)
    x = _some(x, _tint, 0.4, generator)
    x = _some(x, _blur, 0.3, generator)
    x = _some(x, _coarse, 0.15, generator)
    x = _some(x, _blocks, 0.2, generator)
    x = _some(x, _cloud, 0.2, generator)
    return _some(x, _noise, 0.2, generator).clamp_(-1, 1)


def _unit(x: Tensor, generator: Generator) -> Tensor:
    """One number in 0..1 per picture, [B, 1, 1, 1]."""
    return torch.rand(len(x), 1, 1, 1, generator=generator)


def _some(x: Tensor, change: Callable[[Tensor, Generator], Tensor], share: float, generator: Generator) -> Tensor:
    """`change` a random share of the batch."""
    rows = (torch.rand(len(x), generator=generator) < share).nonzero()[:, 0]
    return x.index_copy(0, rows, change(x[rows], generator)) if len(rows) else x


def _affine(x: Tensor, generator: Generator) -> Tensor:
    """Shift up to 3 %, scale 0.94..1.06, turn up to 3 degrees; the border continues outwards."""
    draw = torch.rand(4, len(x), generator=generator) * 2 - 1
    angle, scale = draw[0] * math.radians(3), torch.exp(draw[1] * 0.06)
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.cos(angle) / scale
    theta[:, 0, 1], theta[:, 1, 0] = -torch.sin(angle) / scale, torch.sin(angle) / scale
    theta[:, :, 2] = draw[2:].T * 0.06
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _tint(x: Tensor, generator: Generator) -> Tensor:
    """Contrast and brightness per channel, as a decoder's colour error."""
    draw = torch.rand(2, len(x), 3, 1, 1, generator=generator) * 2 - 1
    return x * (1 + 0.1 * draw[0]) + 0.08 * draw[1]


def _blur(x: Tensor, generator: Generator) -> Tensor:
    """A mixture with a twice-blurred copy (binomial 3x3)."""
    line = torch.tensor([0.25, 0.5, 0.25])
    kernel = (line[:, None] * line[None, :]).expand(3, 1, 3, 3)
    soft = x
    for _ in range(2):
        soft = F.conv2d(F.pad(soft, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    return torch.lerp(x, soft, _unit(x, generator))


def _coarse(x: Tensor, generator: Generator) -> Tensor:
    """Reduced to half the side and enlarged again: fine detail is lost."""
    return F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:], mode="bilinear", align_corners=False)


def _blocks(x: Tensor, generator: Generator) -> Tensor:
    """Quantised 8x8 cosine blocks, coarser for higher frequencies (as JPEG and latent decoders lose them)."""
    count, channels, size, _ = x.shape
    n = torch.arange(8.0)
    basis = torch.cos(math.pi / 8 * (n[None, :] + 0.5) * n[:, None]) * math.sqrt(2 / 8)
    basis[0] /= math.sqrt(2)
    tiles = x.reshape(count, channels, size // 8, 8, size // 8, 8)
    freq = torch.einsum("fy,bcmynx,gx->bcmngf", basis, tiles, basis)
    step = (0.05 + 0.4 * _unit(x, generator)).view(-1, 1, 1, 1, 1, 1) * (1 + n[:, None] + n[None, :]) / 4
    freq = torch.round(freq / step) * step
    return torch.einsum("fy,bcmngf,gx->bcmynx", basis, freq, basis).reshape(x.shape)


def _cloud(x: Tensor, generator: Generator) -> Tensor:
    """Smooth colour noise of about a quarter of the picture's size."""
    coarse = torch.randn(len(x), 3, 6, 6, generator=generator) * 0.15 * _unit(x, generator)
    return x + F.interpolate(coarse, size=x.shape[-2:], mode="bilinear", align_corners=False)


def _noise(x: Tensor, generator: Generator) -> Tensor:
    """Independent noise of every pixel."""
    return x + 0.1 * _unit(x, generator) * torch.randn(x.shape, generator=generator)
