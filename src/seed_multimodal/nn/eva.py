"""EVA ViT-g: pixels → all patch tokens of the penultimate layer, as SEED and BLIP-2 use it.

Note: the released file has 40 blocks, of which the first 39 are used; there is no final norm, head or pooling; keys
have no bias (`[q_bias, 0, v_bias]`); positions are absolute and resized bicubically for another grid.
Source: BAAI EVA-CLIP as shipped by LAVIS (`eva_vit_g.pth`); parameter names are the released ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError, ImageError
from seed_multimodal.nn.layers import Block, LayerNorm, checkpoint_layers, heads_first, heads_last, resize_square
from seed_multimodal.settings import setting


@dataclass(frozen=True)
class EvaConfig:
    """Sizes of the vision encoder; the defaults are the released ones.

    `grad_checkpoint`: recompute the blocks in the backward pass. `pre_norm` (ours): a norm between positions and
    blocks, as CLIP's vision encoders have, so that their weights can be used.
    """

    image_size: int = setting(224, least=1)
    patch_size: int = setting(14, least=1)
    width: int = setting(1408, least=1)
    depth: int = setting(39, least=1)
    heads: int = setting(16, least=1)
    mlp_width: int = setting(6144, least=1)
    grad_checkpoint: bool = False
    pre_norm: bool = False

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ConfigError(f"The image size {self.image_size} is not a multiple of the patch {self.patch_size}.")
        if self.width % self.heads:
            raise ConfigError(f"The vision width {self.width} does not divide into {self.heads} heads.")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens per image: the class token and the patches."""
        return self.grid**2 + 1


class EvaAttention(nn.Module):
    """Self-attention with one fused projection and biases on queries and values only."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BNW: Tensor) -> Tensor:
        """`[B, N, W]` → `[B, N, W]`."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias])
        q, k, v = (heads_first(part, self.heads) for part in F.linear(x_BNW, self.qkv.weight, bias).chunk(3, dim=-1))
        return self.proj(heads_last(F.scaled_dot_product_attention(q, k, v)))


class PatchEmbed(nn.Module):
    """Non-overlapping patches by a strided convolution."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` → `[B, patches, width]`."""
        return self.proj(images).flatten(2).transpose(1, 2)


class EvaVit(nn.Module):
    """The vision encoder; `forward` returns every token, class token first."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.patch_embed = PatchEmbed(config)
        self.norm_pre = LayerNorm(config.width, eps=1e-6) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp_width, EvaAttention)
                                    for _ in range(config.depth))
        self.init_weights()
        if config.grad_checkpoint:
            checkpoint_layers(self)

    def init_weights(self) -> None:
        """Released start for training from scratch; output projections shrink with depth."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, start=1):
                for name in ("attn.proj", "mlp.fc2"):
                    block.get_parameter(f"{name}.weight").div_(math.sqrt(2 * number))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → tokens `[B, 1 + (S / patch)², W]`; `ImageError` for another size."""
        size = self.config.image_size
        if tuple(images.shape[1:]) != (3, size, size):
            raise ImageError(f"Images must be [B, 3, {size}, {size}], got {list(images.shape)}.")
        patches = self.patch_embed(images).to(self.pos_embed.dtype)  # the residual stream stays fp32 under autocast
        x_BNW = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        x_BNW = self.norm_pre(x_BNW + self.pos_embed)
        for block in self.blocks:
            x_BNW = block(x_BNW)
        return x_BNW


def resize_positions(pos_embed: Tensor, grid: int) -> Tensor:
    """Bicubically resize positions `[1, 1 + g², W]` to another square grid; the class token's is kept."""
    return torch.cat([pos_embed[:, :1], resize_square(pos_embed[0, 1:], grid)[None]], dim=1)


# ---- weights of transformers' CLIP vision encoder, which computes the same with `pre_norm` (up to its last norm)

CLIP = "vision_model."


def eva_from_clip(clip: Mapping[str, Tensor], config: EvaConfig) -> dict[str, Tensor]:
    """EVA's tensors from those of a CLIP vision encoder, names with or without `vision_model.`; `config.depth` layers
    are taken. The key bias has no place in EVA: softmax cancels it."""
    clip = {name if name.startswith(CLIP) else CLIP + name: value for name, value in clip.items()}
    patch = clip[f"{CLIP}embeddings.patch_embedding.weight"]
    state = {"cls_token": clip[f"{CLIP}embeddings.class_embedding"].view(1, 1, -1),
             "pos_embed": clip[f"{CLIP}embeddings.position_embedding.weight"][None],
             "patch_embed.proj.weight": patch, "patch_embed.proj.bias": torch.zeros(len(patch))}
    state |= {ours: clip[theirs] for ours, theirs in _clip_names(config.depth, config.pre_norm).items()}
    for i in range(config.depth):
        weights = [clip[f"{CLIP}encoder.layers.{i}.self_attn.{part}_proj.weight"] for part in "qkv"]
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat(weights)
    return state


def clip_from_eva(eva: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Inverse of `eva_from_clip`: the CLIP tensors that EVA has; `prefix` is before its names."""
    eva = {name.removeprefix(prefix): value for name, value in eva.items() if name.startswith(prefix)}
    depth = sum(name.endswith(".attn.qkv.weight") for name in eva)
    state = {f"{CLIP}embeddings.class_embedding": eva["cls_token"].flatten(),
             f"{CLIP}embeddings.position_embedding.weight": eva["pos_embed"][0],
             f"{CLIP}embeddings.patch_embedding.weight": eva["patch_embed.proj.weight"]}
    state |= {theirs: eva[ours] for ours, theirs in _clip_names(depth, "norm_pre.weight" in eva).items()}
    for i in range(depth):
        for part, rows in zip("qkv", eva[f"blocks.{i}.attn.qkv.weight"].chunk(3), strict=True):
            state[f"{CLIP}encoder.layers.{i}.self_attn.{part}_proj.weight"] = rows
    return state


def _clip_names(depth: int, pre_norm: bool) -> dict[str, str]:
    """EVA's name → CLIP's, of tensors that are equal in both."""
    same = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
            "attn.proj": "self_attn.out_proj"}
    names = {f"norm_pre.{part}": f"{CLIP}pre_layrnorm.{part}" for part in ("weight", "bias") if pre_norm}
    for i in range(depth):
        layer = f"{CLIP}encoder.layers.{i}."
        names |= {f"blocks.{i}.{ours}.{part}": f"{layer}{theirs}.{part}"
                  for ours, theirs in same.items() for part in ("weight", "bias")}
        names |= {f"blocks.{i}.attn.{part}_bias": f"{layer}self_attn.{part}_proj.bias" for part in "qv"}
    return names
