"""LaVIT's merger: folds what the dropped patches show into the kept ones.

Each of its blocks looks back over the kept patches (causally, in raster order), then at the dropped ones, then thinks.
All positions are computed, only kept ones are read. Note: the softmax is not the usual one with −inf for masked keys:
the row's maximum is taken over all keys, and ε is spread over all of them, so that a query without a visible key (no
patch was dropped) averages everything. The mask multiplies, which is how the selector gets a gradient.

Source: specification §2.3; parameter names are the released ones. Shape suffixes: B batch, H heads, N patches (Q of
queries, K of keys), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.layers import LayerNorm, Mlp, checkpoint_layers, heads_first, heads_last

EPSILON = 1e-6


def masked_softmax(scores_BHQK: Tensor, allowed: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Weights over the keys, in the dtype of the scores; computed in fp32.

    `e = exp(score − max over all keys) · allowed`, `w = (e + ε / K) / (Σ e + ε)`.

    Args:
        allowed: 1 visible, 0 masked, broadcast to `[B, H, Q, K]`; gradients flow into it.
    """
    scores = scores_BHQK.float()
    weights = (scores - scores.amax(-1, keepdim=True).detach()).exp() * allowed
    weights = (weights + epsilon / weights.shape[-1]) / (weights.sum(-1, keepdim=True) + epsilon)
    return weights.to(scores_BHQK.dtype)


def causal_mask(keep_BN: Tensor) -> Tensor:
    """`[B, N]` → `[B, 1, N, N]`: a patch sees the kept patches before it, and itself."""
    count = keep_BN.shape[1]
    self_NN = torch.eye(count, dtype=keep_BN.dtype, device=keep_BN.device)
    return (keep_BN[:, None, None, :] * (1 - self_NN) + self_NN).tril()


def dropped_mask(keep_BN: Tensor) -> Tensor:
    """`[B, N]` → `[B, 1, 1, N]`: every patch sees the dropped ones."""
    return 1 - keep_BN[:, None, None, :]


def _attend(q_BND: Tensor, k_BND: Tensor, v_BND: Tensor, heads: int, allowed: Tensor) -> Tensor:
    q, k, v = (heads_first(part, heads) for part in (q_BND, k_BND, v_BND))
    weights = masked_softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), allowed)
    return heads_last(weights.to(v.dtype) @ v)


class CausalAttention(nn.Module):
    """Self-attention over the kept patches so far."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, allowed: Tensor) -> Tensor:
        """`[B, N, D]`, `causal_mask` → `[B, N, D]`."""
        q_BND, k_BND, v_BND = self.qkv(x_BND).chunk(3, dim=-1)
        return self.proj(_attend(q_BND, k_BND, v_BND, self.heads, allowed))


class DroppedAttention(nn.Module):
    """Attention from every patch to the dropped ones."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x_BND: Tensor, source_BND: Tensor, allowed: Tensor) -> Tensor:
        """Queries `[B, N, D]`, features of the picture `[B, N, D]`, `dropped_mask` → `[B, N, D]`."""
        return self.proj(_attend(self.query(x_BND), self.key(source_BND), self.value(source_BND), self.heads, allowed))


class MergerBlock(nn.Module):
    """Kept patches so far, dropped patches, MLP; pre-norm."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm0 = LayerNorm(width, eps=1e-5)
        self.token_causal_attn = CausalAttention(width, heads)
        self.norm1 = LayerNorm(width, eps=1e-5)
        self.token_cross_attn = DroppedAttention(width, heads)
        self.norm2 = LayerNorm(width, eps=1e-5)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, x_BND: Tensor, source_BND: Tensor, causal: Tensor, dropped: Tensor) -> Tensor:
        """`[B, N, D]` → `[B, N, D]`."""
        x_BND = x_BND + self.token_causal_attn(self.norm0(x_BND), causal)
        x_BND = x_BND + self.token_cross_attn(self.norm1(x_BND), source_BND, dropped)
        return x_BND + self.mlp(self.norm2(x_BND))


class Merger(nn.Module):
    """The stream starts at the raw features; keys and values of the dropped patches are the normalised ones in every
    block."""

    def __init__(self, width: int, depth: int, heads: int, mlp_width: int, *, grad_checkpoint: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"The merger's width {width} does not divide into {heads} heads.")
        self.blocks = nn.ModuleList(MergerBlock(width, heads, mlp_width) for _ in range(depth))
        self.ln_vision = LayerNorm(width, eps=1e-5)
        self.norm = LayerNorm(width, eps=1e-5)
        if grad_checkpoint:
            checkpoint_layers(self)

    def forward(self, features_BND: Tensor, keep_BN: Tensor) -> Tensor:
        """Raw features `[B, N, D]`, kept (1) or dropped (0) `[B, N]` → `[B, N, D]` in the features' dtype."""
        causal, dropped = causal_mask(keep_BN.float()), dropped_mask(keep_BN.float())
        source_BND, x_BND = self.ln_vision(features_BND), features_BND
        for block in self.blocks:
            x_BND = block(x_BND, source_BND, causal, dropped)
        return self.norm(x_BND)
