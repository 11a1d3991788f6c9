"""Pictures for nano training: a few augmented views of each, made once and kept as uint8 on disk.

View 0 is the picture itself; the others are small scalings and shifts over white, which keep labels, colours and
left/right true. Later stages cache latents and embeddings of the same views, so nothing is encoded twice.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seed_multimodal.disk import replacing
from seed_multimodal.errors import DataError
from seed_multimodal.images.transforms import CLIP_MEAN, CLIP_STD


def augment(images: Tensor, generator: torch.Generator, flip: bool = False) -> Tensor:
    """Scale by 0.88–1.08 and shift by up to 4 % over white, at random for each picture.

    Args:
        images: uint8 `[B, 3, H, W]`.
        flip: also mirror half of the pictures (for reconstruction only: it would falsify labels with a direction).

    Returns:
        uint8 `[B, 3, H, W]`.
    """
    count = images.shape[0]
    scale = torch.empty(count).uniform_(1 / 1.08, 1 / 0.88, generator=generator)
    shift = torch.empty(count, 2).uniform_(-0.08, 0.08, generator=generator)
    mirror = torch.ones(count)
    if flip:
        mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * mirror, scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, [count, 3, *images.shape[2:]], align_corners=False)
    dark = 255.0 - images.float()  # the padding value of grid_sample is 0; white must become 0
    moved = F.grid_sample(dark, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (255.0 - moved).round().clamp(0, 255).to(torch.uint8)


def build_views(images: np.ndarray, views: int, seed: int, file: Path) -> Tensor:
    """Views of all pictures, `[N, views, 3, H, W]` uint8, memory-mapped from `file` (made if absent).

    Args:
        images: uint8 `[N, H, W, 3]`.
    """
    count, height, width, _ = images.shape
    shape = (count, views, 3, height, width)
    if not (file.is_file() and file.stat().st_size == int(np.prod(shape))):
        file.parent.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        pictures = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        with replacing(file) as out:
            for block in pictures.split(256):
                rounds = [block, *(augment(block, generator) for _ in range(1, views))]
                out.write(torch.stack(rounds, 1).numpy().tobytes())
    return open_views(file, count, views, height)


def open_views(file: Path, count: int, views: int, size: int) -> Tensor:
    """The views `[count, views, 3, size, size]` uint8 that `build_views` has kept, memory-mapped.

    Raises:
        DataError: the file is of another size.
    """
    shape = (count, views, 3, size, size)
    if file.stat().st_size != int(np.prod(shape)):
        raise DataError(f"{file}: is not {count} pictures in {views} views of {size} px; remove it to make it anew.")
    return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r+", shape=shape))


def to_signed(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 → float32 in [-1, 1], the VAE's range, on `device`."""
    return images.to(device).float() / 127.5 - 1.0


def to_clip(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 `[B, 3, H, W]` → CLIP-normalised float32 on `device`, the range of every vision tower here."""
    mean = torch.tensor(CLIP_MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(CLIP_STD, device=device).view(1, 3, 1, 1)
    return (images.to(device).float() / 255.0 - mean) / std
