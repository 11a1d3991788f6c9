"""The autoencoder of a diffusion folder: its own `vae/`, or another folder's that its `vae.json` names.

    {"folder": "../../nano/seed_tokenizer/diffusion_model/vae"}

The shipped small systems have nano's autoencoder in common, which is stored once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.detokenizers.pipelines import PipelineDetokenizer, refuse_unfilled
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError
from seed_multimodal.settings import check_keys, check_value

ELSEWHERE = "vae.json"


def autoencoder_folder(place: Path) -> Path:
    """Where the autoencoder of the diffusion folder `place` is.

    Raises:
        CheckpointError: `vae.json` names a folder that holds none.
    """
    own, file = place / "vae", place / ELSEWHERE
    if own.is_dir() or not file.is_file():
        return own
    values = read_json_object(file, CheckpointError)
    check_keys(values, ("folder",), str(file))
    found = place / check_value(str, values.get("folder"), f"{file}: folder")
    if not (found / "config.json").is_file():
        raise CheckpointError(f"{file}: names the autoencoder {found}, where there is no config.json; keep this folder "
                              "beside the one that it names, or put that autoencoder into vae/ here.")
    return found


def read_autoencoder(place: Path, kind: type[PipelineDetokenizer], dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' `AutoencoderKL` of a diffusion folder, in eval mode.

    Args:
        kind: the de-tokenizer it is for, named in messages.

    Raises:
        CheckpointError: not there, damaged or not complete.
    """
    from diffusers import AutoencoderKL

    where = autoencoder_folder(place)
    with kind.reading(place):
        vae = AutoencoderKL.from_pretrained(where.parent, subfolder=where.name, torch_dtype=dtype,
                                            local_files_only=True)
    refuse_unfilled(vae, where)
    return vae.eval()


def pixels_of(vae: Any, latents: Tensor) -> Tensor:
    """Pictures `[B, 3, H, W]` (about -1…1) of latents `[B, C, h, w]`, in float32, whatever the caller's autocast, and
    one after the other, since memory grows with their number."""
    with torch.autocast(vae.device.type, enabled=False):
        return torch.cat([vae.decode(one.to(vae.device, torch.float32) / vae.config.scaling_factor).sample
                          for one in latents.split(1)])
