"""Shared layers: a LayerNorm that is safe in half precision, the two-layer MLP, CLIP's attention pool.

Shape suffixes used in this package: B batch, N tokens, Q queries, W vision width, D query width, d code width.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in fp32, returned in the dtype of its input.

    Half-precision kernels already accumulate in fp32, so only mixed dtypes (fp32 parameters with half activations
    or the reverse, which PyTorch refuses on CPU) need the explicit cast of the released `ln_vision`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` → the same shape and dtype."""
        if x.dtype == self.weight.dtype:
            return super().forward(x).to(x.dtype)
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Mlp(nn.Module):
    """`fc1`, exact (erf) GELU, `fc2`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` → `[..., width]`."""
        return self.fc2(F.gelu(self.fc1(x)))


class AttentionPool(nn.Module):
    """CLIP's attention pool: the mean, put before the sequence, looks at all of it."""

    def __init__(self, length: int, width: int, heads: int, output: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(length + 1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output)

    def forward(self, x_BQD: Tensor) -> Tensor:
        """`[B, Q, D]` → `[B, output]`."""
        x = torch.cat([x_BQD.mean(dim=1, keepdim=True), x_BQD], dim=1) + self.positional_embedding
        seen_BH1d = F.scaled_dot_product_attention(*(heads_first(one, self.heads) for one in (
            self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))))
        return self.c_proj(heads_last(seen_BH1d)).squeeze(1)


def heads_first(x_BND: Tensor, heads: int) -> Tensor:
    """`[B, N, D]` → `[B, heads, N, D / heads]`."""
    return x_BND.unflatten(-1, (heads, -1)).transpose(1, 2)


def heads_last(x_BHNd: Tensor) -> Tensor:
    """`[B, heads, N, d]` → `[B, N, heads · d]`."""
    return x_BHNd.transpose(1, 2).flatten(2)


def cast_layers(module: M, dtype: torch.dtype) -> M:
    """Convert linear and convolution layers alone, in place; norms, embeddings, positions and free parameters keep
    their precision. So the released LaVIT is held: it runs under autocast with an fp32 residual stream."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            part.to(dtype)
    return module
