"""Vision-encoder weights between transformers' CLIP class and EVA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seed_multimodal.vision.eva import EvaConfig

PREFIX = "vision_model."
NAMES = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
         "attn.proj": "self_attn.out_proj"}


def eva_from_clip(clip: Mapping[str, Tensor], config: EvaConfig) -> dict[str, Tensor]:
    """EVA's state dict out of that of transformers' CLIP vision tower, names with or without `vision_model.`.

    With `pre_norm` and all layers it computes what the CLIP tower does, up to that one's last norm. The key bias is
    left out: EVA has none, and softmax does not see it.
    """
    prefix = PREFIX if any(name.startswith(PREFIX) for name in clip) else ""
    patch = clip[prefix + "embeddings.patch_embedding.weight"]
    state = {"cls_token": clip[prefix + "embeddings.class_embedding"].view(1, 1, -1),
             "pos_embed": clip[prefix + "embeddings.position_embedding.weight"][None],
             "patch_embed.proj.weight": patch, "patch_embed.proj.bias": torch.zeros(len(patch))}
    if config.pre_norm:
        state |= {f"norm_pre.{part}": clip[f"{prefix}pre_layrnorm.{part}"] for part in ("weight", "bias")}
    for i in range(config.depth):
        layer = f"{prefix}encoder.layers.{i}."
        for ours, theirs in NAMES.items():
            for part in ("weight", "bias"):
                state[f"blocks.{i}.{ours}.{part}"] = clip[f"{layer}{theirs}.{part}"]
        attention = layer + "self_attn."
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat([clip[f"{attention}{p}_proj.weight"] for p in "qkv"])
        state[f"blocks.{i}.attn.q_bias"] = clip[attention + "q_proj.bias"]
        state[f"blocks.{i}.attn.v_bias"] = clip[attention + "v_proj.bias"]
    return state


def clip_from_eva(eva: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The inverse of `eva_from_clip`: the CLIP tensors that EVA has; `prefix` is before its names."""
    eva = {name.removeprefix(prefix): value for name, value in eva.items() if name.startswith(prefix)}
    embeddings = PREFIX + "embeddings."
    state = {embeddings + "class_embedding": eva["cls_token"].flatten(),
             embeddings + "position_embedding.weight": eva["pos_embed"][0],
             embeddings + "patch_embedding.weight": eva["patch_embed.proj.weight"]}
    for part in ("weight", "bias"):
        if f"norm_pre.{part}" in eva:
            state[f"{PREFIX}pre_layrnorm.{part}"] = eva[f"norm_pre.{part}"]
    for i in range(sum(name.endswith(".attn.qkv.weight") for name in eva)):
        layer = f"{PREFIX}encoder.layers.{i}."
        for ours, theirs in NAMES.items():
            for part in ("weight", "bias"):
                state[f"{layer}{theirs}.{part}"] = eva[f"blocks.{i}.{ours}.{part}"]
        attention = f"blocks.{i}.attn."
        for name, rows in zip("qkv", eva[attention + "qkv.weight"].chunk(3), strict=True):
            state[f"{layer}self_attn.{name}_proj.weight"] = rows
        state[f"{layer}self_attn.q_proj.bias"] = eva[attention + "q_bias"]
        state[f"{layer}self_attn.v_proj.bias"] = eva[attention + "v_bias"]
    return state
