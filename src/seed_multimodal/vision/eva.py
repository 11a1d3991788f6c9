"""EVA ViT-g: pixels → all patch tokens of the penultimate layer, as SEED-2 and BLIP-2 use it.

Note: the released file has 40 blocks and only the first 39 are used; there is no final norm, head or pooling;
keys carry no bias (`[q_bias, 0, v_bias]`); positions are absolute and resized bicubically for another grid.
Source: BAAI EVA-CLIP as shipped by LAVIS (`eva_vit_g.pth`); parameter names are the released ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError, ImageError
from seed_multimodal.settings import setting
from seed_multimodal.vision.checkpointing import checkpoint_layers
from seed_multimodal.vision.layers import LayerNorm, Mlp, heads_first, heads_last
from seed_multimodal.vision.positions import resize_square


@dataclass(frozen=True)
class EvaConfig:
    """Sizes of the vision tower; the defaults are the released ones.

    `grad_checkpoint`: computes the blocks again going backward instead of keeping their activations. `pre_norm` (ours):
    a norm between positions and blocks, as CLIP's towers have, so that one of those can be used as it is.
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
    """Full self-attention with one fused projection and biases on queries and values only."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def qkv_bias(self) -> Tensor:
        """Bias of the fused projection `[3 · W]`: none on the keys."""
        return torch.cat([self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias])

    def forward(self, x_BNW: Tensor) -> Tensor:
        """`[B, N, W]` → `[B, N, W]`."""
        fused = F.linear(x_BNW, self.qkv.weight, self.qkv_bias())
        q, k, v = (heads_first(part, self.heads) for part in fused.chunk(3, dim=-1))
        return self.proj(heads_last(F.scaled_dot_product_attention(q, k, v)))


class EvaBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width, eps=1e-6)
        self.attn = EvaAttention(config.width, config.heads)
        self.norm2 = LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(self, x_BNW: Tensor) -> Tensor:
        """`[B, N, W]` → `[B, N, W]`."""
        x_BNW = x_BNW + self.attn(self.norm1(x_BNW))
        return x_BNW + self.mlp(self.norm2(x_BNW))


class PatchEmbed(nn.Module):
    """Non-overlapping patches by a strided convolution."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` → `[B, patches, width]`."""
        return self.proj(images).flatten(2).transpose(1, 2)


class EvaVit(nn.Module):
    """The vision tower; `forward` returns every token, class token first."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.patch_embed = PatchEmbed(config)
        self.norm_pre = LayerNorm(config.width, eps=1e-6) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(EvaBlock(config) for _ in range(config.depth))
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
        """Normalised pixels `[B, 3, S, S]` → tokens `[B, 1 + (S / patch)², W]`.

        Raises:
            ImageError: for another image size than the tower's.
        """
        self.check_images(images)
        x_BNW = self.start(self.patch_embed(images))
        for block in self.blocks:
            x_BNW = block(x_BNW)
        return x_BNW

    def start(self, patches_BNW: Tensor) -> Tensor:
        """Patches `[B, N, W]` → what the blocks read `[B, 1 + N, W]`, in the precision of the patches."""
        x_BNW = torch.cat([self.cls_token.expand(len(patches_BNW), -1, -1).to(patches_BNW.dtype), patches_BNW], dim=1)
        return self.norm_pre(x_BNW + self.pos_embed.to(x_BNW.dtype))

    def check_images(self, images: Tensor) -> None:
        """Raises `ImageError` for pixels of another shape than `[B, 3, S, S]`."""
        size = self.config.image_size
        if tuple(images.shape[1:]) != (3, size, size):
            raise ImageError(f"Images must be [B, 3, {size}, {size}], got {list(images.shape)}.")


def resize_positions(pos_embed: Tensor, grid: int) -> Tensor:
    """Bicubically resize absolute positions `[1, 1 + g², W]` to another square grid; the class token is kept."""
    class_token, patches = pos_embed[:, :1], pos_embed[:, 1:]
    if patches.shape[1] == grid**2:
        return pos_embed
    return torch.cat([class_token, resize_square(patches[0], grid)[None]], dim=1)
