"""EVA ViT-g: pixels → all patch tokens of the penultimate layer, as SEED and BLIP-2 use it: the
first 39 of 40 blocks, without final norm, head and pooling. Source: BAAI EVA-CLIP as LAVIS ships it
(`eva_vit_g.pth`), with its names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.layers import Block, LayerNorm, checkpoint_layers
from seed_multimodal.nn.vision_encoder import VisionEncoder
from seed_multimodal.settings import setting


@dataclass(frozen=True)
class EvaConfig:
    """Sizes, by default the original ones."""

    image_size: int = setting(224, minimum=1)
    patch_size: int = setting(14, minimum=1)
    width: int = setting(1408, minimum=1)
    depth: int = setting(39, minimum=1)
    heads: int = setting(16, minimum=1)
    mlp_width: int = setting(6144, minimum=1)
    grad_checkpoint: bool = False
    pre_norm: bool = False  # a norm before the blocks, as in CLIP

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"The image size {self.image_size} is not a multiple of the patch "
                f"{self.patch_size}."
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens per image: the class token and the patches."""
        return self.grid**2 + 1


class EvaVit(VisionEncoder):
    """The vision encoder; `forward` returns every token, class token first."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.config = config
        # Names are those of the original's state dict.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)}
        )
        self.norm_pre = LayerNorm(config.width, eps=1e-6) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_width, key_bias=False)
            for _ in range(config.depth)
        )
        self._init_weights()
        if config.grad_checkpoint:
            checkpoint_layers(self)

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for depth, block in enumerate(self.blocks, start=1):
            # Output projections shrink with depth, so that the residual stream does not grow.
            layers: tuple[tuple[nn.Linear, int], ...] = (
                (block.attn.qkv, 1),
                (block.attn.proj, 2 * depth),
                (block.mlp.fc1, 1),
                (block.mlp.fc2, 2 * depth),
            )
            for layer, scale in layers:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                layer.weight.data.div_(math.sqrt(scale))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def n_tokens(self) -> int:
        return self.config.tokens

    @property
    def n_class_tokens(self) -> int:
        return 1

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → tokens `[B, 1 + (S / patch)², W]`."""
        # 1. Patches in raster order; the residual stream stays fp32 under autocast.
        grid_BWgg = self.patch_embed["proj"](images)
        patches_BNW = grid_BWgg.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)

        # 2. The class token in front, and positions.
        class_B1W = self.cls_token.expand(len(patches_BNW), -1, -1)
        x_BNW = torch.cat([class_B1W, patches_BNW], dim=1)
        x_BNW = self.norm_pre(x_BNW + self.pos_embed)

        # 3. Blocks.
        for block in self.blocks:
            x_BNW = block(x_BNW)
        return x_BNW


# ---- weights of transformers' CLIP vision encoder, which computes the same with `pre_norm`, up to
#      its last norm

CLIP_PREFIX = "vision_model."
_CLIP_NAMES = (  # CLIP's -> ours
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder.layers.", "blocks."),
    ("pre_layrnorm", "norm_pre"),
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
    ("self_attn.out_proj", "attn.proj"),
    ("self_attn.q_proj.bias", "attn.q_bias"),
    ("self_attn.v_proj.bias", "attn.v_bias"),
)


def eva_from_clip(clip: Mapping[str, Tensor], config: EvaConfig) -> dict[str, Tensor]:
    """EVA's tensors from a CLIP vision encoder; its key bias cancels in the softmax."""
    # 1. Fuse the projections of queries, keys and values.
    clip = {name.removeprefix(CLIP_PREFIX): value for name, value in clip.items()}
    for i in range(config.depth):
        layer = f"encoder.layers.{i}"
        weights = [clip[f"{layer}.self_attn.{part}_proj.weight"] for part in "qkv"]
        clip[f"{layer}.attn.qkv.weight"] = torch.cat(weights)

    # 2. Rename, and give class token, positions and the missing bias EVA's shapes.
    state = {}
    for name, value in clip.items():
        for clip_name, eva_name in _CLIP_NAMES:
            name = name.replace(clip_name, eva_name)
        state[name] = value
    state["cls_token"] = state["cls_token"].view(1, 1, -1)
    state["pos_embed"] = state["pos_embed"][None]
    state["patch_embed.proj.bias"] = torch.zeros(len(state["patch_embed.proj.weight"]))

    # 3. Leave out what EVA does not have: key biases and the last norm.
    with torch.device("meta"):
        names = EvaVit(config).state_dict()
    return {name: state[name] for name in names}


def clip_from_eva(eva: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Inverse of `eva_from_clip`: the CLIP tensors that EVA has.

    `prefix` stands before EVA's names.
    """
    state: dict[str, Tensor] = {}
    for name, value in eva.items():
        # CLIP has no bias of the patches.
        if not name.startswith(prefix) or name.endswith("patch_embed.proj.bias"):
            continue
        name = name.removeprefix(prefix)
        for clip_name, eva_name in _CLIP_NAMES:
            name = name.replace(eva_name, clip_name)

        # Divide the fused projections; class token and positions lose EVA's batch dimension.
        if name.endswith("attn.qkv.weight"):
            layer = name.removesuffix("attn.qkv.weight")
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                state[f"{CLIP_PREFIX}{layer}self_attn.{part}_proj.weight"] = rows
            continue
        if name == "embeddings.class_embedding":
            value = value.flatten()
        elif "position_emb" in name:
            value = value[0]
        state[CLIP_PREFIX + name] = value
    return state
