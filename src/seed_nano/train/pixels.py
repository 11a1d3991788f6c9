"""Scenes as pixels, and pixels as what each model of nano takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.images.transforms import CLIP_MEAN, CLIP_STD
from seed_nano.world.scene import Scene, render


def scene_pixels(scenes: Sequence[Scene], size: int) -> Tensor:
    """Pictures of scenes, uint8 `[N, 3, size, size]`."""
    if not scenes:
        return torch.zeros(0, 3, size, size, dtype=torch.uint8)
    return torch.from_numpy(np.stack([render(scene, size) for scene in scenes])).permute(0, 3, 1, 2).contiguous()


def to_signed(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 → float32 in [-1, 1], the VAE's range, on `device`."""
    return images.to(device).float() / 127.5 - 1.0


def to_clip(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 `[B, 3, H, W]` → CLIP-normalised float32 on `device`, the range of every vision tower here."""
    mean = torch.tensor(CLIP_MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(CLIP_STD, device=device).view(1, 3, 1, 1)
    return (images.to(device).float() / 255.0 - mean) / std
