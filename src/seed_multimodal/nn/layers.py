"""Layers shared by the networks, and activation checkpointing.

Shape suffixes used in this package: B batch, N tokens, Q queries, W vision width, D query width, d
code width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from seed_multimodal.errors import ConfigError

Network = TypeVar("Network", bound=nn.Module)
Attend = Callable[..., Tensor]  # queries, keys, values `[B, heads, N, d]` and `attn_mask`
FEW_KEYS = 128  # up to which `scaled_dot_product` avoids the fused kernel
FEW_ROWS = 32  # of a linear layer, for which its conversion to float32 takes longer than it saves


def scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """torch's attention of `[B, heads, N, d]`; options: of it.

    On a CPU the fused kernel's backward in bfloat16 takes several times as long as the plain
    one's for few keys, so the plain one trains these.
    """
    is_slow = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if is_slow and torch.is_grad_enabled() and key.shape[-2] <= FEW_KEYS:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, **options)
    return F.scaled_dot_product_attention(query, key, value, **options)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout) inside; every submodule's own mode is restored after."""
    training = [submodule for submodule in module.modules() if submodule.training]
    for submodule in training:
        submodule.training = False
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


class LayerNorm(nn.LayerNorm):
    """LayerNorm in fp32, returned in the dtype of its input.

    Parameters and input may differ in precision.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` → the same shape and dtype."""
        # Under autocast torch returns fp32.
        if x.dtype == self.weight.dtype:
            return super().forward(x).to(x.dtype)
        weight = self.weight.float()
        bias = self.bias.float()
        normed = F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)
        return normed.to(x.dtype)


class Mlp(nn.Module):
    """`fc1`, exact (erf) GELU, `fc2`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` → `[..., width]`."""
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection; EVA's has no bias of the keys.

    attend: computes it, see `multi_head`.
    """

    def __init__(
        self, width: int, heads: int, key_bias: bool = True, attend: Attend | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.attend = attend
        if not key_bias:
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
        self.qkv = nn.Linear(width, 3 * width, bias=key_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[B, N, D]` → `[B, N, D]`; mask: broadcast to `[B, heads, N, N]`."""
        # 1. Projections; EVA stores the biases of queries and values apart.
        if self.qkv.bias is None:
            k_bias = torch.zeros_like(self.v_bias, requires_grad=False)
            bias = torch.cat([self.q_bias, k_bias, self.v_bias])
            qkv = F.linear(x_BND, self.qkv.weight, bias)
        else:
            qkv = self.qkv(x_BND)

        # 2. Attention of each head.
        query, key, value = qkv.chunk(3, dim=-1)
        return self.proj(multi_head(query, key, value, self.heads, self.attend, attn_mask=mask))


class Block(nn.Module):
    """Pre-norm transformer block; the MLP is four times as wide unless `mlp_width` is given."""

    def __init__(
        self, width: int, heads: int, mlp_width: int | None = None, key_bias: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, key_bias)
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_width or 4 * width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """`[B, N, D]` → `[B, N, D]`."""
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))


class AttentionPool(nn.Module):
    """CLIP's attention pool: the mean of the sequence attends to itself and the sequence."""

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
        mean_B1D = x_BQD.mean(dim=1, keepdim=True)
        x = torch.cat([mean_B1D, x_BQD], dim=1) + self.positional_embedding  # [B, 1 + Q, D]
        # The mean is the only query.
        pooled = multi_head(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x), self.heads)
        return self.c_proj(pooled).squeeze(1)


class SdxlHead(nn.Module):
    """Base of networks whose outputs have the form of those of SDXL's two text encoders."""

    def add_head(self, length: int, width: int, heads: int, prompt: int, pooled: int) -> None:
        """length, width: of the features. prompt, pooled: widths of the encoders' outputs."""
        self.unet_proj_1 = nn.Linear(width, prompt)
        self.unet_proj_2 = nn.Linear(width, pooled)
        self.unet_attnpool = AttentionPool(length, width, heads, pooled)

    def head(self, x_BQD: Tensor) -> tuple[Tensor, Tensor]:
        """Features → hidden states side by side, `[B, Q, prompt + pooled]`, and the second's pooled
        output."""
        prompt = torch.cat([self.unet_proj_1(x_BQD), self.unet_proj_2(x_BQD)], dim=-1)
        return prompt, self.unet_attnpool(x_BQD)


def task_layer(width: int, output: int) -> nn.Sequential:
    """The layers around a codebook."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, output))


def multi_head(
    query_BQD: Tensor,
    key_BND: Tensor,
    value_BND: Tensor,
    heads: int,
    attend: Attend | None = None,
    **options: Any,
) -> Tensor:
    """Attention of each head: `[B, Q, D]`. Raises ConfigError: D does not divide into `heads`.

    attend: gets `[B, heads, N, D / heads]` and the options; None: torch's.
    """
    if attend is None:  # answers, which need no gradient, call torch's at once
        trains = torch.is_grad_enabled()
        attend = scaled_dot_product if trains else F.scaled_dot_product_attention
    by_head: list[Tensor] = []  # [B, heads, N, D / heads]
    for x_BND in (query_BQD, key_BND, value_BND):
        if x_BND.shape[-1] % heads:
            raise ConfigError(f"A width of {x_BND.shape[-1]} does not divide into {heads} heads.")
        by_head.append(x_BND.unflatten(-1, (heads, -1)).transpose(1, 2))
    return attend(*by_head, **options).transpose(1, 2).flatten(2)


def resize_square(table_NW: Tensor, grid: int) -> Tensor:
    """Bicubically resize positions of a square grid `[g², W]` to `[grid², W]`, in fp32.

    Unchanged at that size.
    """
    side = math.isqrt(len(table_NW))
    if side == grid:
        return table_NW
    square = table_NW.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]  # [1, W, g, g]
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    rows = resized[0].permute(1, 2, 0).flatten(0, 1)  # [grid², W]
    return rows.to(table_NW.dtype)


def cast_layers(module: Network, dtype: torch.dtype) -> Network:
    """Convert linear and convolution weights in place.

    Norms, embeddings and positions keep their precision.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            layer.to(dtype)
    return module


def cpu_computes_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 that PyTorch's library uses."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def avoid_slow_bfloat16(module: nn.Module) -> None:
    """Let layers of bfloat16 weights compute in float32 on a CPU without bfloat16 instructions.

    PyTorch's own bfloat16 there is 300 times slower in a convolution, and 8 times in a linear layer
    of many rows. Weights are converted while their layer computes.
    """
    if cpu_computes_bfloat16():
        return
    for layer in module.modules():
        if type(layer) in (nn.Conv2d, nn.Linear) and type(layer.weight) is nn.Parameter:
            layer.forward = functools.partial(_float32_forward, layer)


def _float32_forward(layer: nn.Conv2d | nn.Linear, features: Tensor) -> Tensor:
    """The layer's `forward`."""
    is_slow = {features.dtype, layer.weight.dtype} == {torch.bfloat16}
    if isinstance(layer, nn.Linear):
        is_slow &= features.numel() >= FEW_ROWS * features.shape[-1]
    if features.device.type != "cpu" or not is_slow:
        return type(layer).forward(layer, features)  # type: ignore[arg-type]

    weight = layer.weight.float()
    bias = None if layer.bias is None else layer.bias.float()
    if isinstance(layer, nn.Linear):
        return F.linear(features.float(), weight, bias).bfloat16()
    return layer._conv_forward(features.float(), weight, bias).bfloat16()


def checkpoint_layers(model: nn.Module) -> None:
    """Recompute every trained layer of the module lists in `model` in the backward pass.

    May be called again.
    """
    for layers in model.modules():
        if not isinstance(layers, nn.ModuleList):
            continue
        for layer in layers:
            # A layer that is already wrapped, or has nothing to train, stays as it is.
            is_checkpointed = isinstance(layer.forward, functools.partial)
            is_trained = any(parameter.requires_grad for parameter in layer.parameters())
            if is_trained and not is_checkpointed:
                layer.forward = functools.partial(checkpointed, layer.forward)


def checkpointed(forward: Callable[..., Tensor], *args: object) -> Tensor:
    """`forward(*args)`, recomputed in the backward pass."""
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_same_attention)


def _same_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the forward pass and of its recomputation.

    Both must use the same attention kernels.
    """
    cuda = torch.backends.cuda  # these switches hold for every device
    switches = (
        (SDPBackend.MATH, cuda.math_sdp_enabled),
        (SDPBackend.FLASH_ATTENTION, cuda.flash_sdp_enabled),
        (SDPBackend.EFFICIENT_ATTENTION, cuda.mem_efficient_sdp_enabled),
        (SDPBackend.CUDNN_ATTENTION, cuda.cudnn_sdp_enabled),
    )
    # The backward pass usually runs outside of a caller's own choice of kernels.
    allowed = [backend for backend, is_allowed in switches if is_allowed()]
    return nullcontext(), sdpa_kernel(allowed)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine along the last axis without an epsilon, as in the original: `[..., D]` → `[...]`."""
    a = a.float()
    b = b.float()
    products = (a * b).sum(-1)
    return products / (a.norm(dim=-1) * b.norm(dim=-1))
