"""EVA ViT-g: pixels → all patch tokens of the penultimate layer, as SEED and BLIP-2 use it.

Of the original file's 40 blocks the first 39 are used; there is no final norm, head or pooling; keys have no bias.
Source: BAAI EVA-CLIP as shipped by LAVIS (`eva_vit_g.pth`), with its parameter names.
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
    """Sizes of the vision encoder; the defaults are the original ones. `grad_checkpoint`: recompute the blocks in the
    backward pass. `pre_norm` (ours): a norm before the blocks, as in CLIP, whose weights can then be used."""

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


class EvaVit(nn.Module):
    """The vision encoder; `forward` returns every token, class token first."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.patch_embed = nn.ModuleDict({
            "proj": nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)})
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
        for name, value in self.blocks.named_parameters():
            if name.endswith("weight") and value.ndim == 2:
                nn.init.trunc_normal_(value, std=0.02)
            elif name.endswith((".bias", "_bias")):
                nn.init.zeros_(value)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, start=1):
                for name in ("attn.proj", "mlp.fc2"):
                    block.get_parameter(f"{name}.weight").div_(math.sqrt(2 * number))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → tokens `[B, 1 + (S / patch)², W]`; `ImageError` for another size."""
        size = self.config.image_size
        if tuple(images.shape[1:]) != (3, size, size):
            raise ImageError(f"Images must be [B, 3, {size}, {size}], got {list(images.shape)}.")
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        patches = patches.to(self.pos_embed.dtype)  # the residual stream stays fp32 under autocast
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
_CLIP_NAMES = (("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding.weight", "pos_embed"),
               ("embeddings.patch_embedding", "patch_embed.proj"), ("encoder.layers.", "blocks."),
               ("pre_layrnorm", "norm_pre"), ("layer_norm1", "norm1"), ("layer_norm2", "norm2"),
               ("self_attn.out_proj", "attn.proj"), ("self_attn.q_proj.bias", "attn.q_bias"),
               ("self_attn.v_proj.bias", "attn.v_bias"))


def eva_from_clip(clip: Mapping[str, Tensor], config: EvaConfig) -> dict[str, Tensor]:
    """EVA's tensors from those of a CLIP vision encoder, names with or without `vision_model.`; `config.depth` layers
    are taken. The key bias has no place in EVA: softmax cancels it."""
    clip = {name.removeprefix(CLIP): value for name, value in clip.items()}
    for i in range(config.depth):
        parts = [clip[f"encoder.layers.{i}.self_attn.{part}_proj.weight"] for part in "qkv"]
        clip[f"encoder.layers.{i}.attn.qkv.weight"] = torch.cat(parts)
    state = {}
    for name, value in clip.items():
        for theirs, ours in _CLIP_NAMES:
            name = name.replace(theirs, ours)
        state[name] = value
    state |= {"cls_token": state["cls_token"].view(1, 1, -1), "pos_embed": state["pos_embed"][None],
              "patch_embed.proj.bias": torch.zeros(len(state["patch_embed.proj.weight"]))}
    with torch.device("meta"):
        names = EvaVit(config).state_dict()
    return {name: state[name] for name in names}


def clip_from_eva(eva: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Inverse of `eva_from_clip`: the CLIP tensors that EVA has; `prefix` is before its names."""
    state: dict[str, Tensor] = {}
    for name, value in eva.items():
        if not name.startswith(prefix) or name.endswith("patch_embed.proj.bias"):
            continue
        name = name.removeprefix(prefix)
        for theirs, ours in _CLIP_NAMES:
            name = name.replace(ours, theirs)
        if name.endswith("attn.qkv.weight"):
            layer = name.removesuffix("attn.qkv.weight")
            state |= {f"{CLIP}{layer}self_attn.{part}_proj.weight": rows
                      for part, rows in zip("qkv", value.chunk(3), strict=True)}
        else:
            is_class = name == "embeddings.class_embedding"
            state[CLIP + name] = value.flatten() if is_class else value[0] if "position_emb" in name else value
    return state
