"""The decode side's transformer block: pre-norm, full attention, one fused projection with a joint bias."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.vision.layers import LayerNorm, Mlp, heads_first, heads_last

__all__ = ["Attention", "Block", "LayerNorm", "Mlp", "run_blocks"]


class Attention(nn.Module):
    """Multi-head self-attention in which every token sees every token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"The width {width} does not divide into {heads} decode heads.")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """`[B, N, D]` → `[B, N, D]`."""
        q, k, v = (heads_first(part, self.heads) for part in self.qkv(x_BND).chunk(3, dim=-1))
        return self.proj(heads_last(F.scaled_dot_product_attention(q, k, v)))


class Block(nn.Module):
    """`x += attn(norm1(x)); x += mlp(norm2(x))`, LayerNorm eps 1e-6, MLP four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """`[B, N, D]` → `[B, N, D]`."""
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))


def run_blocks(x_BND: Tensor, blocks: nn.ModuleList) -> Tensor:
    """Apply the blocks in order: `[B, N, D]` → `[B, N, D]`."""
    for block in blocks:
        x_BND = block(x_BND)
    return x_BND
