"""Shared training code of denoisers: size conditions, trained parameters, start."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

TrainedLayers = Literal["key_value", "all"]  # of a denoiser
# Of all attentions; Stable Diffusion 3 has others for the conditions.
KEY_VALUE = ("to_k", "to_v", "add_k_proj", "add_v_proj")


def size_ids(
    size: tuple[int, int],
    *,
    original: tuple[int, int] | None = None,
    crop: tuple[int, int] = (0, 0),
    count: int = 1,
) -> Tensor:
    """SDXL's conditions `[count, 6]` (Podell et al.

    2023, 2.2): original size, crop (top, left), target size.
    """
    ids = torch.tensor([[*(original or size), *crop, *size]], dtype=torch.float32)
    return ids.expand(count, -1)


def train_unet(unet: nn.Module, which: TrainedLayers) -> None:
    """Enable gradients of a whole denoiser ("all"), or of its attention keys and values."""
    for name, parameter in unet.named_parameters():
        layer = name.rpartition(".")[0].rpartition(".")[2]
        parameter.requires_grad_(which == "all" or layer in KEY_VALUE)


def new_diffusion(source: Path, target: Path) -> None:
    """Write a diffusers folder: a new U-Net with the sizes of the source's, the source's
    autoencoder, and SDXL's noise schedule."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    sizes = UNet2DConditionModel.load_config(source / "unet")
    UNet2DConditionModel.from_config(sizes).save_pretrained(target / "unet")
    shutil.copytree(source / "vae", target / "vae")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(target / "scheduler")
