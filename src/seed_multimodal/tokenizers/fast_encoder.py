"""The arithmetic of `fast.optimise`: an encoder on packed weights, in a few functions that compile once each.

The vision tower computes in `dtype`, its stream in `residual_dtype`; the Q-Former's products in `query_dtype`, its
stream and norms in float32; task layer and code search in float32. Rounding in the tower is averaged over hundreds of
patches, rounding in the Q-Former is not: at bf16 that part alone moves 1 to 2 % of the codes.
Note: the first Q-Former layer's self-attention sees no image, so it is computed once, with the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seed_multimodal.tokenizers.encoder import CodeTokenizer
from seed_multimodal.tokenizers.fast_weights import (
    Block,
    Residual,
    Search,
    Stem,
    pack_block,
    pack_keys_values,
    pack_layer,
    pack_search,
    pack_stem,
)
from seed_multimodal.vision.eva import EvaVit
from seed_multimodal.vision.layers import heads_first, heads_last

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
VIT_EPS, LN_VISION_EPS, QUERY_EPS = 1e-6, 1e-5, 1e-12


class FastVision:
    """Pixels → the tower's output on packed weights; `wrap` is applied to each function once (compiler, or nothing)."""

    def __init__(self, tower: EvaVit, *, dtype: torch.dtype, residual_dtype: torch.dtype, head_width: int | None,
                 gelu: str, wrap: Wrap) -> None:
        sizes = tower.config
        self.dtype, self.residual_dtype, self.gelu = dtype, residual_dtype, gelu
        self.patch_size, self.heads, self.scale = sizes.patch_size, sizes.heads, (sizes.width // sizes.heads) ** -0.5
        self.stem = pack_stem(tower, dtype, residual_dtype)
        self.blocks = [pack_block(block, dtype, head_width) for block in tower.blocks]
        self._embed, self._block = wrap(embed_patches), wrap(vision_block)

    def __call__(self, images: Tensor) -> Tensor:
        """Pixels `[B, 3, S, S]` in `dtype` → the stream before `ln_vision` `[B, N, W]` in `residual_dtype`."""
        x, h = self._embed(images, self.stem, self.patch_size)
        for block in self.blocks:
            x, h = self._block(x, h, block, self.heads, self.scale, self.gelu)
        return x


class FastEncoder:
    """Pixels → codes on packed weights; `wrap` as in `FastVision`.

    Weights that need no packing are the tokenizer's own; the others are copies, so optimise anew after a change.
    """

    def __init__(self, model: CodeTokenizer, *, dtype: torch.dtype, residual_dtype: torch.dtype,
                 query_dtype: torch.dtype, head_width: int | None, gelu: str, wrap: Wrap) -> None:
        qformer = model.config.qformer
        self.dtype, self.residual_dtype = dtype, residual_dtype
        self.vision = FastVision(model.visual_encoder, dtype=dtype, residual_dtype=residual_dtype,
                                 head_width=head_width, gelu=gelu, wrap=wrap)
        self.query_heads = qformer.heads
        self.causal = model.config.num_query == qformer.causal_queries
        self.prepare = model.quantize.prepare
        self.kv, self.kv_bias = pack_keys_values(model, query_dtype)
        self.layers = [pack_layer(layer, query_dtype) for layer in model.Qformer.bert.encoder.layer]
        self.search = pack_search(model)
        start = model.Qformer.bert.embeddings.LayerNorm(model.query_tokens.float()).float()
        self.start = self_attend(start, self.layers[0][0], self.query_heads, self.causal)
        self._keys_values, self._layer = wrap(keys_values), wrap(query_layer)
        self._task, self._nearest = wrap(task_layer), wrap(nearest)

    def query_features(self, images: Tensor) -> Tensor:
        """Pixels → Q-Former output `[B, 32, D]` float32."""
        return self.query_features_from(self.vision(images))

    def query_features_from(self, vit_BNW: Tensor) -> Tensor:
        """The tower's output `[B, N, W]` in `residual_dtype` → Q-Former output `[B, 32, D]` float32."""
        sides = iter(self._keys_values(vit_BNW, self.kv, self.kv_bias).split(self.start.shape[2], -1))
        x = self.start.expand(len(vit_BNW), -1, -1)
        for number, (attention, cross, forward) in enumerate(self.layers):
            k, v = (next(sides), next(sides)) if cross is not None else (None, None)
            x = self._layer(x, k, v, attention if number else None, cross, forward, self.query_heads, self.causal)
        return x

    def pre_quant(self, images: Tensor) -> Tensor:
        """Pixels → features to quantise `[B, 32, d]` float32."""
        return self._task(self.query_features(images), self.search)

    def codes(self, images: Tensor) -> Tensor:
        """Pixels → codes `[B, 32]` int64."""
        return self.codes_from(self.vision(images))

    def codes_from(self, vit_BNW: Tensor) -> Tensor:
        """The tower's output `[B, N, W]` in `residual_dtype` → codes `[B, 32]` int64."""
        features = self._task(self.query_features_from(vit_BNW), self.search)
        return self._nearest(self.prepare(features), self.search)


def embed_patches(images: Tensor, stem: Stem, size: int) -> tuple[Tensor, Tensor]:
    """Pixels `[B, 3, S, S]` → stream `[B, N, W]` and its norm, in the dtype of the patch matrix."""
    grid = images.shape[-1] // size
    patches = images.unflatten(3, (grid, size)).unflatten(2, (grid, size))  # [B, 3, g, p, g, p]
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    patches = F.linear(F.pad(patches, (0, stem.patch.shape[1] - patches.shape[2])), stem.patch)
    x = torch.cat([stem.first.expand(len(images), -1, -1), patches + stem.rest], dim=1)
    if stem.norm is not None:
        x = F.layer_norm(x.float(), x.shape[-1:], stem.norm, stem.norm_bias, VIT_EPS).to(x.dtype)
    return x, normed(x, VIT_EPS, stem.patch.dtype)


def vision_block(x: Tensor, h: Tensor, w: Block, heads: int, scale: float, gelu: str) -> tuple[Tensor, Tensor]:
    """One block: stream and its norm `[B, N, W]` → the same for the next block."""
    q, k, v = (heads_first(part, heads) for part in F.linear(h, w.qkv, w.qkv_bias).chunk(3, dim=-1))
    mixed = heads_last(F.scaled_dot_product_attention(q, k, v, scale=scale))
    x = x + F.linear(mixed, w.proj, w.proj_bias)
    h = normed(x, VIT_EPS, h.dtype)
    if gelu == "tanh":
        hidden = linear_gelu_tanh(h, w.fc1, w.fc1_bias)
    else:
        hidden = F.gelu(F.linear(h, w.fc1, w.fc1_bias))
    x = x + F.linear(hidden, w.fc2, w.fc2_bias)
    return x, normed(x, VIT_EPS, h.dtype)


def normed(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Zero mean, unit variance along the last axis, computed in float32, rounded once."""
    return F.layer_norm(x if x.dtype == dtype else x.float(), x.shape[-1:], None, None, eps).to(dtype)


def keys_values(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Stream `[B, N, W]` → keys and values of all cross-attentions `[B, N, layers · 2 · D]`."""
    return F.linear(normed(x, LN_VISION_EPS, weight.dtype), weight, bias)


def query_layer(x: Tensor, k: Tensor | None, v: Tensor | None, attention: Residual | None, cross: Residual | None,
                forward: Residual, heads: int, causal: bool) -> Tensor:
    """One Q-Former layer on float32 `[B, 32, D]`; `k`, `v` `[B, N, D]`; `attention` is None where it is done."""
    if attention is not None:
        x = self_attend(x, attention, heads, causal)
    if cross is not None and k is not None and v is not None:
        q = F.linear(x.to(forward.first.dtype), cross.first, cross.first_bias)
        mixed = F.scaled_dot_product_attention(*(heads_first(part, heads) for part in (q, k, v)))
        x = _close(x, heads_last(mixed), cross)
    hidden = F.gelu(F.linear(x.to(forward.first.dtype), forward.first, forward.first_bias))
    return _close(x, hidden, forward)


def self_attend(x: Tensor, w: Residual, heads: int, causal: bool) -> Tensor:
    """The queries among themselves: float32 `[B, 32, D]` → the same."""
    fused = F.linear(x.to(w.first.dtype), w.first, w.first_bias)
    q, k, v = (heads_first(part, heads) for part in fused.chunk(3, dim=-1))
    return _close(x, heads_last(F.scaled_dot_product_attention(q, k, v, is_causal=causal)), w)


def _close(x: Tensor, inner: Tensor, w: Residual) -> Tensor:
    return F.layer_norm(F.linear(inner, w.dense, w.dense_bias).float() + x, w.norm.shape, w.norm, w.norm_bias,
                        QUERY_EPS)


def task_layer(x: Tensor, w: Search) -> Tensor:
    """Q-Former output `[B, 32, D]` float32 → features to quantise `[B, 32, d]` float32."""
    return F.linear(F.linear(x, w.first, w.first_bias).tanh(), w.second, w.second_bias)


def nearest(z: Tensor, w: Search) -> Tensor:
    """Index of the nearest code, the first of a tie: `[B, 32, d]` float32 → `[B, 32]` int64."""
    sections, d, each = w.codes.shape
    points = z.reshape(-1, sections, d).transpose(0, 1)
    found = torch.baddbmm(w.offset, points, w.codes).argmax(dim=2)
    if sections > 1:
        found = found + each * torch.arange(sections, device=z.device)[:, None]
    return found.T.reshape(z.shape[:2])


@torch.library.custom_op("seed_multimodal::linear_gelu_tanh", mutates_args=())
def linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu(x W + b)` by its tanh formula, on a GPU inside the matrix product: `[B, N, W]` → `[B, N, M]`.

    An operator of its own, because the compiler would take the two apart again.
    """
    if x.is_cuda and x.dtype != torch.float32:
        return torch._addmm_activation(bias, x.flatten(0, 1), weight.T, use_gelu=True).unflatten(0, x.shape[:2])
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@linear_gelu_tanh.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def compiler(mode: str | None) -> Wrap:
    """The `wrap` of a compile mode (`fast.MODES`): compiles each function; None leaves it as it is."""
    if mode is None:
        return lambda function: function
    # Inductor's own CUDA graphs would be recorded inside ours.
    options = dict(torch._inductor.list_mode_options("max-autotune-no-cudagraphs")) if mode != "default" else {}
    if mode == "max-autotune-tma":
        options["triton.enable_persistent_tma_matmul"] = True
    return lambda function: torch.compile(function, options=options or None, dynamic=False, fullgraph=True)
