"""transformers' CLIP: its frozen halves from a folder, and its tensors by EVA's names.

EVA's network with `pre_norm` computes the same as CLIP's vision encoder, up to its last norm.
"""

from __future__ import annotations

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
_LAYERS = {  # of a block: EVA's name → CLIP's
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def eva_from_clip(clip: Mapping[str, Tensor], depth: int, pre_norm: bool = True) -> State:
    """EVA's tensors, with `depth` blocks, from a CLIP vision encoder."""
    # 1. What is before the blocks; CLIP's patches have no bias.
    clip = {name.removeprefix(CLIP_PREFIX): value for name, value in clip.items()}
    patches = clip["embeddings.patch_embedding.weight"]
    state = {
        "cls_token": clip["embeddings.class_embedding"].view(1, 1, -1),
        "pos_embed": clip["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": patches,
        "patch_embed.proj.bias": patches.new_zeros(len(patches)),
    }
    layers = {"norm_pre": "pre_layrnorm"} if pre_norm else {}

    # 2. The blocks, with fused projections; the bias of keys cancels in the softmax.
    for index in range(depth):
        block, layer = f"blocks.{index}", f"encoder.layers.{index}"
        attention = f"{layer}.self_attn"
        if f"{attention}.q_proj.weight" not in clip:
            break  # a CLIP of fewer blocks
        weights = [clip[f"{attention}.{part}_proj.weight"] for part in "qkv"]
        state[f"{block}.attn.qkv.weight"] = torch.cat(weights)
        for part in "qv":
            state[f"{block}.attn.{part}_bias"] = clip[f"{attention}.{part}_proj.bias"]
        layers |= {f"{block}.{ours}": f"{layer}.{theirs}" for ours, theirs in _LAYERS.items()}
    for eva_name, clip_name in layers.items():
        for kind in ("weight", "bias"):
            state[f"{eva_name}.{kind}"] = clip[f"{clip_name}.{kind}"]
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


def load_clip_text(source: str | Path, device: str | torch.device) -> PreTrainedModel:
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
    model, _ = load_library_model(
        model_class, folder, "CLIP", CLIP_ADVICE, config=config, dtype=dtype
    )
    return model.to(device).requires_grad_(False)
