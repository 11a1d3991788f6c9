"""Base of the stages that run in the library's training loop, and scenes as pixels and as a stream
of batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from seed_multimodal.data.stream.order import EpochOrder
from seed_multimodal.data.stream.step_batches import SampleDataset, StepBatches
from seed_multimodal.training.meters import Metrics
from seed_multimodal.training.task import ONE_PROCESS, RunView, StageTask
from seed_nano.train.workspace import QUIET, Workspace
from seed_nano.world.scene import Scene, render, render_with_mask
from seed_nano.world.splits import scene_at
from seed_nano.world.targets import label_tensor

Loss: TypeAlias = tuple[Tensor, Metrics]
LENGTH = 2**40  # of the stream: more than any training takes


def scene_pixels(scenes: Sequence[Scene], size: int) -> Tensor:
    """Images of scenes, uint8 `[N, 3, size, size]`."""
    images = np.stack([render(scene, size) for scene in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def map_scenes(
    function: Callable[[Tensor], Tensor], scenes: Sequence[Scene], space: Workspace, batch: int
) -> Tensor:
    """What `function` makes of the images of scenes, uint8 on the device, batch by batch; on the
    CPU."""
    results = []
    for start in range(0, len(scenes), batch):
        pixels = scene_pixels(scenes[start : start + batch], space.config.image_size)
        results.append(function(pixels.to(space.device)).cpu())
    return torch.cat(results)


def to_signed(images: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1], the VAE's range."""
    return images.float() / 127.5 - 1.0


class SceneStream(SampleDataset[dict[str, Tensor]]):
    """Training scenes by number, for `StepBatches`; a batch has `image` uint8 `[B, 3, S, S]`,
    `labels` int64 `[B, 5]` (`seed_nano.world.targets`) and `mask` float32 `[B, 1, S, S]`: how much
    of each pixel is a thing."""

    def __init__(self, space: Workspace) -> None:
        self.size: int = space.config.image_size
        self.seed: int = space.config.seed

    def __len__(self) -> int:
        return LENGTH

    def get(self, index: int, epoch: int = 0) -> dict[str, Tensor]:
        """The scene of a number."""
        scene = scene_at(self.seed, index)
        pixels, mask = render_with_mask(scene, self.size)
        return {
            "image": torch.tensor(pixels).permute(2, 0, 1),
            "labels": label_tensor([scene])[0],
            "mask": torch.from_numpy(mask)[None],
        }


class NanoTask(StageTask):
    """Stage NAME with the settings `train_NAME`; its record holds the smoothed numbers of the last
    steps. Subclasses define `loss` and `save_result`.

    stream: scenes that are drawn for each step; None: a batch has rows of the cached `features`.
    """

    scenes: StepBatches[dict[str, Tensor]] | None = None
    features: Tensor

    def __init__(
        self, space: Workspace, name: str, module: nn.Module, stream: SceneStream | None = None
    ) -> None:
        super().__init__(name, module.to(space.device), getattr(space.config, f"train_{name}"))
        self.enter(space)
        if stream is not None:
            self.scenes = StepBatches(
                [stream],
                self.settings.batch_size,
                seed=0,
                workers=space.config.workers,
                shuffle=False,
            )

    def enter(self, space: Workspace) -> None:
        """Take a workspace and the settings that count at a resume."""
        self.space = space
        self.ddp_options = ONE_PROCESS  # the losses call parts of the module past its `forward`
        section = f"train_{self.name}"
        settings = asdict(space.config)
        self.config = {key: settings[key] for key in ("seed", "image_size", section)}
        self.quiet_keys = [f"{section}.{key}" for key in QUIET]

    def batch(self, micro_step: int) -> Any:
        """The batch of the stream, on the device, or indices of `features`."""
        if self.scenes is None:
            return self.indices(micro_step, len(self.features))
        batch = self.scenes.at(micro_step)
        return {name: value.to(self.space.device) for name, value in batch.items()}

    def indices(self, micro_step: int, n_rows: int, count: int = 0) -> Tensor:
        """The rows of a step among cached ones; `count`: instead of the batch size."""
        batch_size = count or self.settings.batch_size
        order = EpochOrder(n_rows, self.settings.seed)
        samples = order.samples(micro_step * batch_size, batch_size)
        return torch.tensor([index for _, index in samples])

    def save_result(self) -> None:
        """Write the trained networks."""
        raise NotImplementedError

    def finish(self, run: RunView) -> Mapping[str, object]:
        if self.scenes is not None:
            self.scenes.close()
        self.save_result()
        metrics = {key: round(value, 4) for key, value in self.meter.smooth.items()}
        parameters = sum(parameter.numel() for parameter in self.module.parameters())
        return {**super().finish(run), "parameters": parameters, **metrics}
