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
from seed_multimodal.images.transforms import ImageTransform, seed_image_processor
from seed_multimodal.nn.layers import Block, LayerNorm, checkpoint_layers, resize_square
from seed_multimodal.nn.vision.base import State, VisionConfig, VisionEncoder
from seed_multimodal.nn.vision.clip import eva_from_clip, is_clip, load_clip_vision
from seed_multimodal.settings import positive
from seed_multimodal.state_dicts import load_state_dict, require_tensor, tensors_below
from seed_multimodal.weights.catalogue import download_advice
from seed_multimodal.weights.find import find_file

FILES = ("eva_vit_g.safetensors", "eva_vit_g.pth")
PREFIX = "visual_encoder."  # before its names in checkpoints of models around it
UNUSED = ("norm.*", "fc_norm.*", "head.*", "mask_token", "rel_pos_bias.*", "lm_head.*")


@dataclass(frozen=True)
class EvaConfig(VisionConfig):
    """Sizes, by default the original ones."""

    image_size: int = positive(224)
    patch_size: int = positive(14)
    width: int = positive(1408)
    depth: int = positive(39)
    heads: int = positive(16)
    mlp_width: int = positive(6144)
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

    @property
    def preprocessing(self) -> ImageTransform:
        """Squashed bicubically, with CLIP's mean."""
        return seed_image_processor(self.image_size)

    @property
    def unused(self) -> tuple[str, ...]:  # type: ignore[override]
        """The end of the original encoder, which is not computed."""
        return (*UNUSED, f"blocks.{self.depth}.*")

    def build(self) -> EvaVit:
        return EvaVit(self)

    def read_weights(self, source: str) -> State:
        """Its tensors: of `eva_vit_g.pth` (a file, its folder or a hub id), of a checkpoint that
        holds them as `visual_encoder.*`, or (ours) of a transformers CLIP folder's first layers.
        """
        # 1. A CLIP folder.
        if is_clip(source):
            clip = load_clip_vision(source, log=None)
            return eva_from_clip(clip.state_dict(), self.depth, self.pre_norm)

        # 2. A file of EVA, or a checkpoint around it.
        file = find_file(source, FILES, f"{download_advice('tokenizer')}, or give its path")
        state = load_state_dict(file, mapped=True)
        vision = tensors_below(state, PREFIX) or state
        require_tensor(vision, "patch_embed.proj.weight", file, "an EVA vision encoder")
        return vision

    def fit_weights(self, state: Mapping[str, Tensor], prefix: str = "") -> State:
        """The tensors with the position embeddings resized to the image size."""
        name = f"{prefix}pos_embed"
        embeddings = state.get(name)  # [1, 1 + patches, W], the class token first
        if embeddings is None or embeddings.ndim != 3 or embeddings.shape[1] == self.tokens:
            return dict(state)
        patches = resize_square(embeddings[0, 1:], self.grid)
        return {**state, name: torch.cat([embeddings[:, :1], patches[None]], dim=1)}


class EvaVit(VisionEncoder):
    """The vision encoder; `forward` returns every token, class token first."""

    config: EvaConfig

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.n_tokens = config.tokens
        self.n_class_tokens = 1
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
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        # Output projections shrink with depth, so that the residual stream does not grow.
        for depth, block in enumerate(self.blocks, start=1):
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.data.div_(math.sqrt(2 * depth))

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
