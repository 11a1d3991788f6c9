"""A SEED encoder's weights as `fast.optimise` computes with them: fused, folded, padded, once and in float32.

* A block's norm is folded into the matrix after it, so every block is the same function of (stream, normed stream).
* Queries, keys and values are one product with one bias; so are all keys and values of the Q-Former's
  cross-attentions, which read the same image; patches are a matrix product, their bias part of the positions.
* The nearest code is the largest `z · c - |c|² / 2`: one product, because `|z|²` is the same for all codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.tokenizers.encoder import CodeTokenizer
from seed_multimodal.tokenizers.qformer import QFormerLayer
from seed_multimodal.vision.eva import EvaAttention, EvaBlock, EvaVit

ALIGNMENT = 8  # matrix units need rows of a multiple of 16 bytes


class Block(NamedTuple):
    """A vision block; rows of `qkv` are ordered (q | k | v, head, width of a head)."""

    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor


class Residual(NamedTuple):
    """`LayerNorm(x + inner(...))` of the Q-Former: `first` makes q, k, v (or q, or the hidden layer)."""

    first: Tensor
    first_bias: Tensor
    dense: Tensor
    dense_bias: Tensor
    norm: Tensor
    norm_bias: Tensor


class Stem(NamedTuple):
    """Patch matrix `[W, 3p² padded]`, class token with its position `[1, 1, W]`, positions with the patch bias; gain
    and shift of the norm after them, if the tower has it."""

    patch: Tensor
    first: Tensor
    rest: Tensor
    norm: Tensor | None
    norm_bias: Tensor | None


class Search(NamedTuple):
    """Task layer and codebook: `codes` `[sections, d, K / sections]`, `offset` `-|c|² / 2` `[sections, 1, K / s]`."""

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    codes: Tensor
    offset: Tensor


def pack_stem(tower: EvaVit, dtype: torch.dtype, stream: torch.dtype) -> Stem:
    """The patch convolution as a matrix, positions and class token in the stream's dtype."""
    weight, places = tower.patch_embed.proj.weight.float().flatten(1), tower.pos_embed.float()
    bias = tower.patch_embed.proj.bias.float()
    weight = F.pad(weight, (0, -weight.shape[1] % ALIGNMENT))
    norm = tower.norm_pre if isinstance(tower.norm_pre, nn.LayerNorm) else None
    return Stem(_own(weight, dtype), _own(tower.cls_token.float() + places[:, :1], stream),
                _own(places[:, 1:] + bias, stream), None if norm is None else _own(norm.weight),
                None if norm is None else _own(norm.bias))


def pack_block(block: EvaBlock, dtype: torch.dtype, head_width: int | None) -> Block:
    """Fold the norms, fuse the biases, and pad each head with zeros to `head_width`."""
    attention: EvaAttention = block.attn
    qkv, qkv_bias = _fold(block.norm1, attention.qkv.weight, attention.qkv_bias())
    fc1, fc1_bias = _fold(block.norm2, block.mlp.fc1.weight, block.mlp.fc1.bias)
    proj = attention.proj.weight.float()
    if head_width is not None:
        heads, own = attention.heads, proj.shape[1] // attention.heads
        more = head_width - own
        qkv = F.pad(qkv.unflatten(0, (3 * heads, own)), (0, 0, 0, more)).flatten(0, 1)
        qkv_bias = F.pad(qkv_bias.unflatten(0, (3 * heads, own)), (0, more)).flatten()
        proj = F.pad(proj.unflatten(1, (heads, own)), (0, more)).flatten(1)
    fc2 = block.mlp.fc2
    return Block(*(_own(part, dtype) for part in
                   (qkv, qkv_bias, proj, attention.proj.bias, fc1, fc1_bias, fc2.weight, fc2.bias)))


def _fold(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`linear(norm(x))` as a linear layer on the normalised x without gain and shift."""
    weight = weight.float()
    return weight * norm.weight.float(), bias.float() + weight @ norm.bias.float()


def pack_layer(layer: QFormerLayer, dtype: torch.dtype) -> tuple[Residual, Residual | None, Residual]:
    """A Q-Former layer: self-attention with q, k and v in one matrix; cross-attention without keys and values (None
    where it has none); the queries' feed-forward."""
    own, cross, forward = layer.attention.self, layer.crossattention, layer.intermediate_query.dense
    parts = (own.query, own.key, own.value)
    fused, fused_bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
    return (_residual(fused, fused_bias, layer.attention.output, dtype),
            None if cross is None else _residual(cross.self.query.weight, cross.self.query.bias, cross.output, dtype),
            _residual(forward.weight, forward.bias, layer.output_query, dtype))


def _residual(weight: Tensor, bias: Tensor, output: nn.Module, dtype: torch.dtype) -> Residual:
    dense, norm = output.dense, output.LayerNorm
    return Residual(_own(weight, dtype), _own(bias, dtype), _own(dense.weight, dtype), _own(dense.bias, dtype),
                    _own(norm.weight), _own(norm.bias))


def pack_keys_values(model: CodeTokenizer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of every cross-attention, `ln_vision` folded in: `[layers · 2 · D, W]` and its bias."""
    sides = [side for layer in model.Qformer.bert.encoder.layer if layer.crossattention is not None
             for side in (layer.crossattention.self.key, layer.crossattention.self.value)]
    folded = [_fold(model.ln_vision, side.weight, side.bias) for side in sides]
    return _own(torch.cat([w for w, _ in folded]), dtype), _own(torch.cat([b for _, b in folded]), dtype)


def pack_search(model: CodeTokenizer) -> Search:
    """Task layer and codebook in float32, codes as they are compared."""
    first, _, second = model.encode_task_layer
    quantizer = model.quantize
    codes = quantizer.prepare(quantizer.embedding.weight.float()).unflatten(0, (quantizer.sections, -1))
    return Search(*map(_own, (first.weight, first.bias, second.weight, second.bias, codes.transpose(1, 2),
                              -0.5 * codes.square().sum(2)[:, None])))


def _own(part: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A plain contiguous tensor: for the compiler a parameter is another kind of input."""
    return part.detach().to(dtype).contiguous()
