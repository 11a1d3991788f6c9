"""The small CLIP that nano trains: its text tower, rows of token ids for it, and EVA weights from its vision tower.

Both towers are transformers' own classes, so their weights load without this library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.config import load_yaml
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.vision.eva import EvaConfig
from seed_multimodal.weights import assign_strictly, load_state_dict

MAX_TEXT = 24
"""Token ids of a caption, with begin and end of text."""
SIZES = {"width": "text_width", "layers": "text_layers", "embedding": "embedding"}
PREFIX = "vision_model."


def text_tower(vocabulary: int, *, width: int, layers: int, embedding: int) -> Any:
    """An untrained `CLIPTextModelWithProjection` over the `vocabulary` word pieces and one end-of-text id after them.

    The end of text has the largest id because transformers' tower reads its embedding there.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=vocabulary + 1, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=MAX_TEXT, projection_dim=embedding, hidden_act="gelu",
        bos_token_id=1, eos_token_id=2, pad_token_id=0))


def load_text_tower(file: Path, vocabulary: int) -> Any:
    """The frozen text tower of a nano run, in eval mode: weights in `file`, sizes in the run's config.yaml beside it.

    Raises:
        CheckpointError: files that are not there, or weights of another size. ConfigError: no sizes in config.yaml.
    """
    settings = file.parent / "config.yaml"
    if not settings.is_file():
        raise CheckpointError(f"{file}: has no config.yaml beside it, which says how large the tower is.")
    try:
        sizes = {name: int(load_yaml(settings).clip[key]) for name, key in SIZES.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{settings}: does not say how large the text tower is ("
                          f"{', '.join(f'clip.{key}' for key in SIZES.values())}).") from error
    tower = text_tower(vocabulary, **sizes)
    assign_strictly(tower, load_state_dict(file), file)
    return tower.requires_grad_(False).eval()


def caption_ids(texts: Sequence[Sequence[int]], end: int) -> Tensor:
    """Token id lists → int64 `[B, MAX_TEXT]`: begin of text, the ids cut to fit, end of text, padding 0."""
    rows = torch.zeros(len(texts), MAX_TEXT, dtype=torch.long)
    for row, ids in zip(rows, texts, strict=True):
        line = [1, *list(ids)[:MAX_TEXT - 2], end]
        row[:len(line)] = torch.tensor(line)
    return rows


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
