"""Scenes as pixels, as each model's input, and as an endless stream of training batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.images.transforms import CLIP_MEAN, CLIP_STD
from seed_nano.world.scene import Scene, render, thing_mask
from seed_nano.world.splits import scene_at
from seed_nano.world.targets import label_tensor

LENGTH = 2**40  # of the stream: more than any training takes


def scene_pixels(scenes: Sequence[Scene], size: int) -> Tensor:
    """Images of scenes, uint8 `[N, 3, size, size]`."""
    if not scenes:
        return torch.zeros(0, 3, size, size, dtype=torch.uint8)
    return torch.from_numpy(np.stack([render(scene, size) for scene in scenes])).permute(0, 3, 1, 2).contiguous()


def to_signed(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 → float32 in [-1, 1], the VAE's range, on `device`."""
    return images.to(device).float() / 127.5 - 1.0


def to_clip(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 `[B, 3, H, W]` → CLIP-normalised float32 on `device`, the range of every vision encoder here."""
    mean = torch.tensor(CLIP_MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(CLIP_STD, device=device).view(1, 3, 1, 1)
    return (images.to(device).float() / 255.0 - mean) / std


class SceneStream:
    """Training scenes by number, for `StepBatches`; a batch has `image` uint8 `[B, 3, S, S]`, `labels` int64 `[B, 5]`
    (`seed_nano.world.targets`) and `mask` float32 `[B, 1, S, S]`: how much of each pixel is a thing."""

    shard_sizes = None

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return LENGTH

    def get(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """One scene: `get_batch` of one, without the batch's axis."""
        return {name: value[0] for name, value in self.get_batch(np.array([index]), epoch).items()}

    def get_batch(self, indices: np.ndarray, epoch: int = 0) -> dict[str, Any]:
        """The scenes of some numbers."""
        scenes = [scene_at(self.seed, int(index)) for index in indices]
        masks = torch.from_numpy(np.stack([thing_mask(scene, self.size) for scene in scenes]))[:, None]
        return {"image": scene_pixels(scenes, self.size), "labels": label_tensor(scenes), "mask": masks}
