"""Base of the stages that run in the library's training loop, and scenes as pixels and as a stream
of batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seed_multimodal.data.stream.loader import SampleDataset, StepBatches
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.task import StageTask
from seed_nano.train.workspace import Workspace
from seed_nano.world.scene import Scene, render, thing_mask
from seed_nano.world.splits import scene_at
from seed_nano.world.targets import label_tensor

LENGTH = 2**40  # of the stream: more than any training takes
QUIET = (
    "report_to",
    "run_name",
    "logging_steps",
    "save_seconds",
    "save_steps",
    "save_total_limit",
    "async_save",
    "resume",
    "curves",
    "timeout_minutes",
)  # settings that change no number


def scene_pixels(scenes: Sequence[Scene], size: int) -> Tensor:
    """Images of scenes, uint8 `[N, 3, size, size]`."""
    return (
        torch.from_numpy(np.stack([render(scene, size) for scene in scenes]))
        .permute(0, 3, 1, 2)
        .contiguous()
    )


@torch.no_grad()
def map_scenes(
    function: Callable[[Tensor], Tensor], scenes: Sequence[Scene], space: Workspace, batch: int
) -> Tensor:
    """What `function` makes of the images of scenes, uint8 on the device, batch by batch; on the
    CPU."""
    images = (
        scene_pixels(scenes[at : at + batch], space.config.image_size)
        for at in range(0, len(scenes), batch)
    )
    return torch.cat([function(part.to(space.device)).cpu() for part in images])


def to_signed(images: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1], the VAE's range."""
    return images.float() / 127.5 - 1.0


class SceneStream(SampleDataset[int]):
    """Training scenes by number, for `StepBatches`; a batch has `image` uint8 `[B, 3, S, S]`,
    `labels` int64 `[B, 5]` (`seed_nano.world.targets`) and `mask` float32 `[B, 1, S, S]`: how much
    of each pixel is a thing."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return LENGTH

    def get(self, index: int, epoch: int = 0) -> int:
        """The number of a scene; `get_batch` draws it."""
        return index

    def get_batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The scenes of some numbers."""
        scenes = [scene_at(self.seed, index) for index in indices]
        masks = torch.from_numpy(np.stack([thing_mask(scene, self.size) for scene in scenes]))[
            :, None
        ]
        return {
            "image": scene_pixels(scenes, self.size),
            "labels": label_tensor(scenes),
            "mask": masks,
        }


class NanoTask(StageTask):
    """Stage NAME with the settings `train_NAME`; its record holds the smoothed numbers of the last
    steps."""

    def __init__(self, space: Any, name: str, module: nn.Module, stream: Any = None) -> None:
        super().__init__(name, module, getattr(space.config, f"train_{name}"))
        self.enter(space)
        if stream is not None:
            self.scenes: Any = StepBatches(
                stream,
                self.settings.batch_size,
                seed=0,
                workers=space.config.workers,
                shuffle=False,
                collate=stream.get_batch,
            )

    def enter(self, space: Any) -> None:
        """Take a workspace and the settings that count at a resume."""
        self.space: Workspace = space
        self.parallel = False  # the losses call parts of the module past its `forward`
        section = f"train_{self.name}"
        settings = asdict(space.config)
        self.config = {key: settings[key] for key in ("seed", "image_size", section)}
        self.quiet_keys = [f"{section}.{key}" for key in QUIET]

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        if hasattr(self, "scenes"):
            self.scenes.close()
        metrics = {key: round(value, 4) for key, value in self.meter.smooth.items()}
        return {
            **super().finish(group),
            "parameters": sum(p.numel() for p in self.module.parameters()),
            **metrics,
        }
