"""transformers' CLIP: its frozen halves from a folder, and its tensors by EVA's names.

EVA's network with `pre_norm` computes the same as CLIP's vision encoder, up to its last norm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seed_multimodal.disk import read_json_object
from seed_multimodal.nn.pretrained import CONFIG, load_library_model
from seed_multimodal.weights.find import find_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

State = dict[str, Tensor]
Log = Callable[[str], None] | None

CLIP_FOLDER = "CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_ADVICE = (
    f"download laion/{CLIP_FOLDER} from the Hugging Face hub and put it at pretrained/{CLIP_FOLDER}"
)


# ---- names

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


# CLIP's tensors that EVA does not have as such; the key bias cancels in the softmax.
_NOT_IN_EVA = re.compile(
    r"embeddings\.position_ids|post_layernorm\..*|visual_projection\..*|.*attn\.k_proj\.bias"
    r"|.*attn\.[qkv]_proj\.weight"
)


def eva_from_clip(clip: Mapping[str, Tensor], depth: int, pre_norm: bool = True) -> State:
    """EVA's tensors, with `depth` blocks, from a CLIP vision encoder."""
    # 1. Fuse the projections of queries, keys and values.
    clip = {name.removeprefix(CLIP_PREFIX): value for name, value in clip.items()}
    for i in range(depth):
        layer = f"encoder.layers.{i}"
        if f"{layer}.self_attn.q_proj.weight" not in clip:
            break
        weights = [clip[f"{layer}.self_attn.{part}_proj.weight"] for part in "qkv"]
        clip[f"{layer}.attn.qkv.weight"] = torch.cat(weights)

    # 2. Rename, without what EVA does not have and the layers behind its last block.
    state = {}
    for name, value in clip.items():
        match = re.match(r"encoder\.layers\.(\d+)\.", name)
        if _NOT_IN_EVA.fullmatch(name) or (match and int(match[1]) >= depth):
            continue
        if name.startswith("pre_layrnorm") and not pre_norm:
            continue
        for clip_name, eva_name in _CLIP_NAMES:
            name = name.replace(clip_name, eva_name)
        state[name] = value

    # 3. Give class token, positions and the missing bias EVA's shapes.
    state["cls_token"] = state["cls_token"].view(1, 1, -1)
    state["pos_embed"] = state["pos_embed"][None]
    state["patch_embed.proj.bias"] = torch.zeros(len(state["patch_embed.proj.weight"]))
    return state


# ---- a CLIP folder


def is_clip(source: str | Path) -> bool:
    """Whether a folder's `config.json` is a CLIP's."""
    file = Path(source) / CONFIG
    if not file.is_file():
        return False
    return str(read_json_object(file).get("model_type")).startswith("clip")


def load_clip_vision(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    log: Log = print,
) -> PreTrainedModel:
    """A CLIP's frozen vision encoder in eval mode; its `.image_embeds` are stage 2's target.

    source: a transformers folder or hub id, of a complete CLIP or its vision half.

    Raises:
        CheckpointError: missing (with instructions), damaged, or weights of another size than in
            config.json.
    """
    from transformers import CLIPVisionModelWithProjection

    model = _load_clip(CLIPVisionModelWithProjection, source, device, dtype)
    if log is not None:
        log(f"{source}: CLIP's vision encoder loaded.")
    return model


def load_clip_text(source: str | Path, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The frozen text encoder of a CLIP folder or hub id; see `load_clip_vision`."""
    from transformers import CLIPTextModelWithProjection

    return _load_clip(CLIPTextModelWithProjection, source, device, torch.float32)


def _load_clip(
    model_class: type[PreTrainedModel],
    source: str | Path,
    device: str | torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    folder = find_folder(source, (CONFIG, "*.safetensors", "*.bin", "*.index.json"), CLIP_ADVICE)
    # A complete CLIP states its width outside of vision_config, where a default would be read.
    values = read_json_object(folder / CONFIG, advice=CLIP_ADVICE)
    config = model_class.config_class.from_pretrained(folder)
    config.projection_dim = values.get("projection_dim", config.projection_dim)
    model: PreTrainedModel = load_library_model(
        model_class,
        folder,
        "CLIP",
        CLIP_ADVICE,
        config=config,
        dtype=dtype,
        ignore_mismatched_sizes=True,
    )
    return model.to(device).requires_grad_(False)
