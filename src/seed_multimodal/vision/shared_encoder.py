"""A vision encoder stored once: `tower.json` in a folder names another model's file that holds its tensors.

    {"file": "../../model.safetensors", "prefix": "visual_encoder."}

LaVIT's folder names a file with the same EVA tensors. A CLIP folder names a SEED tokenizer's file; the tensors that EVA
has no place for (key biases, last norm, projection) stay in the folder's own `model.safetensors`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from seed_multimodal.disk import read_json_object, replace_text
from seed_multimodal.errors import CheckpointError
from seed_multimodal.settings import check_keys, check_value
from seed_multimodal.vision.clip_towers import clip_from_eva
from seed_multimodal.weights import load_state_dict, save_state_dict

ELSEWHERE = "tower.json"


def name_encoder(folder: str | Path, file: str | Path, prefix: str) -> None:
    """Write `tower.json`: the vision encoder of the model in `folder` is in `file`, under names with a prefix."""
    where = Path(os.path.relpath(Path(file).resolve(), Path(folder).resolve())).as_posix()
    replace_text(Path(folder) / ELSEWHERE, json.dumps({"file": where, "prefix": prefix}) + "\n")


def named_encoder(folder: Path) -> tuple[Path, str] | None:
    """The file and the prefix of `tower.json`; None without one.

    Raises:
        CheckpointError: the named file is missing.
    """
    listed = folder / ELSEWHERE
    if not listed.is_file():
        return None
    values = read_json_object(listed)
    check_keys(values, ("file", "prefix"), str(listed))
    file, prefix = (check_value(str, values.get(key), f"{listed}: {key}") for key in ("file", "prefix"))
    if not (folder / file).is_file():
        raise CheckpointError(f"{listed}: names the file {folder / file} for the vision encoder, which is missing; "
                              "keep this folder beside the one that it names.")
    return folder / file, prefix


def with_named_encoder(folder: Path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP folder's own tensors, with those of the file that its `tower.json` names."""
    named = named_encoder(folder)
    return state if named is None else {**clip_from_eva(load_state_dict(named[0]), named[1]), **state}


def share_encoder(folder: Path, file: Path, prefix: str) -> bool:
    """Remove the tensors from a CLIP folder that are equal in `file`, and name `file` instead; False if any differs."""
    own, shared = load_state_dict(folder / "model.safetensors"), clip_from_eva(load_state_dict(file), prefix)
    if not all(name in own and own[name].equal(value) for name, value in shared.items()):
        return False
    save_state_dict({name: value for name, value in own.items() if name not in shared}, folder / "model.safetensors",
                    {"format": "pt"})
    name_encoder(folder, file, prefix)
    return True
