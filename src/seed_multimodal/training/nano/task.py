"""Base of nano's own stages: one process, batches of training scenes by step, the count of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.nano.scenes import SceneStream, scene_batches
from seed_multimodal.training.nano.workspace import Workspace
from seed_multimodal.training.stage import StageTask


class NanoTask(StageTask):
    """A stage NAME with the settings `train_NAME`; built on a workspace, run by `training.loop.train`."""

    def __init__(self, space: Workspace, name: str, module: nn.Module) -> None:
        # Not in parallel: the losses call parts of the module past its `forward`.
        super().__init__(name, module, getattr(space.config, f"train_{name}"), parallel=False)
        self.space = space

    def parameter_count(self) -> int:
        """Parameters of the module."""
        return sum(p.numel() for p in self.module.parameters())


class SceneTask(NanoTask):
    """A stage that sees fresh scenes in every step."""

    def __init__(self, space: Workspace, name: str, module: nn.Module) -> None:
        super().__init__(space, name, module)
        stream = SceneStream(space.config.image_size, space.config.seed)
        self.scenes = scene_batches(stream, self.settings.batch_size, space.config.workers)

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        self.scenes.close()
        return super().finish(group)
