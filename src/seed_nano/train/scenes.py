"""Scenes as training batches by step: drawn when they are asked for, never stored; any step can be had alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from seed_multimodal.data.stream.step_batches import StepBatches
from seed_nano.train.pixels import scene_pixels
from seed_nano.world.scene import thing_mask
from seed_nano.world.splits import scene_at
from seed_nano.world.targets import label_tensor

ENDLESS = 2**40
"""Length of the stream: more than any training takes."""


class SceneStream:
    """Training scenes by number, for `StepBatches`; a batch has `image` uint8 `[B, 3, S, S]`, `labels` int64 `[B, 5]`
    (`seed_nano.world.targets`) and `mask` float32 `[B, 1, S, S]`: how much of each pixel is a thing."""

    shard_sizes = None

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return ENDLESS

    def get(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """One scene: `get_batch` of one, without the batch's axis."""
        return {name: value[0] for name, value in self.get_batch(np.array([index]), epoch).items()}

    def get_batch(self, indices: np.ndarray, epoch: int = 0) -> dict[str, Any]:
        """The scenes of some numbers."""
        scenes = [scene_at(self.seed, int(index)) for index in indices]
        masks = torch.from_numpy(np.stack([thing_mask(scene, self.size) for scene in scenes]))[:, None]
        return {"image": scene_pixels(scenes, self.size), "labels": label_tensor(scenes), "mask": masks}


def scene_batches(stream: SceneStream, batch_size: int, workers: int) -> StepBatches:
    """The stream in its own order."""
    return StepBatches(stream, batch_size, seed=0, workers=workers, shuffle=False)
