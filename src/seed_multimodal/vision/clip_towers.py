"""EVA weights from nano's CLIP vision tower, which is transformers' own class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seed_multimodal.vision.eva import EvaConfig

PREFIX = "vision_model."


def eva_from_clip(clip: Mapping[str, Tensor], config: EvaConfig) -> dict[str, Tensor]:
    """EVA's state dict out of that of transformers' CLIP vision tower, names with or without `vision_model.`.

    With `pre_norm` and all layers it computes what the CLIP tower does, up to that one's last norm. The key bias is
    left out: EVA has none, and softmax does not see it.
    """
    prefix = PREFIX if any(name.startswith(PREFIX) for name in clip) else ""
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
             "attn.proj": "self_attn.out_proj"}
    patch = clip[prefix + "embeddings.patch_embedding.weight"]
    state = {"cls_token": clip[prefix + "embeddings.class_embedding"].view(1, 1, -1),
             "pos_embed": clip[prefix + "embeddings.position_embedding.weight"][None],
             "patch_embed.proj.weight": patch, "patch_embed.proj.bias": torch.zeros(len(patch))}
    if config.pre_norm:
        state |= {f"norm_pre.{part}": clip[f"{prefix}pre_layrnorm.{part}"] for part in ("weight", "bias")}
    for i in range(config.depth):
        layer = f"{prefix}encoder.layers.{i}."
        for ours, theirs in names.items():
            for part in ("weight", "bias"):
                state[f"blocks.{i}.{ours}.{part}"] = clip[f"{layer}{theirs}.{part}"]
        attention = layer + "self_attn."
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat([clip[f"{attention}{p}_proj.weight"] for p in "qkv"])
        state[f"blocks.{i}.attn.q_bias"] = clip[attention + "q_proj.bias"]
        state[f"blocks.{i}.attn.v_bias"] = clip[attention + "v_proj.bias"]
    return state
