"""One half of a CLIP in transformers' layout, frozen: the vision tower that gives stage 2's target, or the text tower.

Note: the width of a whole CLIP's projection is the model's own `projection_dim`; the one inside its
`vision_config` or `text_config` is transformers' default and is ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError
from seed_multimodal.hub import find_folder
from seed_multimodal.nn.eva import clip_from_eva
from seed_multimodal.nn.pretrained import named_encoder
from seed_multimodal.tokenizers.checkpoints import empty_model
from seed_multimodal.weights import assign_strictly, load_state_dict

Log = Callable[[str], None] | None

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

CLIP_FOLDER = "CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_WHERE = f"download laion/{CLIP_FOLDER} from the Hugging Face hub and put it at pretrained/{CLIP_FOLDER}"
SAFE, OLD = "model.safetensors", "pytorch_model.bin"
# Half → model_type of a folder that holds it alone, and what a whole CLIP holds besides.
KINDS = {"vision": "clip_vision_model", "text": "clip_text_model"}
IGNORED = {"vision": ("text_model.*", "text_projection.*", "logit_scale", "*position_ids"),
           "text": ("vision_model.*", "visual_projection.*", "logit_scale", "*position_ids")}


def load_clip_vision(path_or_id: str | Path, *, device: str | torch.device = "cpu",
                     dtype: torch.dtype = torch.float32, log: Log = print) -> CLIPVisionModelWithProjection:
    """The frozen CLIP vision tower whose `.image_embeds` are stage 2's target, in eval mode.

    Args:
        path_or_id: transformers folder of a whole CLIP or of its vision half, or a hub id.

    Returns:
        The model; its `load_report` names what was loaded and which tensors (the text tower's) were not needed.

    Raises:
        CheckpointError: not there (names what to put where), damaged, or weights of another size than its config.json.
    """
    return _load(path_or_id, "vision", device, dtype, log)


def load_clip_text(path_or_id: str | Path, *, device: str | torch.device = "cpu",
                   dtype: torch.dtype = torch.float32, log: Log = print) -> CLIPTextModelWithProjection:
    """The frozen text tower of a CLIP folder or hub id; see `load_clip_vision`."""
    return _load(path_or_id, "text", device, dtype, log)


def _load(path_or_id: str | Path, half: str, device: str | torch.device, dtype: torch.dtype, log: Log) -> Any:
    import transformers

    folder = find_folder(path_or_id, ("config.json", "model*.safetensors", f"{SAFE}.index.json"), CLIP_WHERE)
    if not any(folder.glob("model*.safetensors")):
        folder = find_folder(path_or_id, ("config.json", "pytorch_model*.bin", f"{OLD}.index.json"), CLIP_WHERE)
    name = f"CLIP{half.capitalize()}"
    config = getattr(transformers, f"{name}Config").from_dict(_settings(folder, half))
    state, source = _tensors(folder)
    model = empty_model(getattr(transformers, f"{name}ModelWithProjection"), config, device, dtype)
    report = assign_strictly(model, state, source, allow_missing=["*position_ids"], allow_unexpected=IGNORED[half],
                             foreign=True)
    model.load_report = report
    if log is not None:
        log(report.describe())
    return model


def _settings(folder: Path, half: str) -> dict[str, Any]:
    """Sizes of one half from the folder's config.json."""
    values = read_json_object(folder / "config.json", advice=CLIP_WHERE)
    kind = values.get("model_type")
    if kind == "clip":
        width = {key: values[key] for key in ("projection_dim",) if key in values}
        return {**(values.get(f"{half}_config") or {}), **width}
    if kind != KINDS[half]:
        raise CheckpointError(f"{folder / 'config.json'}: describes a {kind!r}, not a CLIP with a {half} tower; "
                              f"{CLIP_WHERE}.")
    return values


def _tensors(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a folder and the file that stands for them (an index where they are in several)."""
    for name in (SAFE, OLD):
        file, index = folder / name, folder / f"{name}.index.json"
        if file.is_file():
            named, state = named_encoder(folder), load_state_dict(file)
            return state if named is None else {**clip_from_eva(load_state_dict(named[0]), named[1]), **state}, file
        if index.is_file():
            shards = read_json_object(index, advice=CLIP_WHERE).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise CheckpointError(f"{index}: not an index of shards: it holds no 'weight_map'.")
            return {key: value for shard in sorted(set(map(str, shards.values())))
                    for key, value in load_state_dict(folder / shard).items()}, index
    raise CheckpointError(f"{folder}: holds no {SAFE} or {OLD}; {CLIP_WHERE}.")
