"""Base of the stages that run in the library's training loop: one process, batches by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from seed_multimodal.data.stream.step_batches import StepBatches
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.stage import StageTask
from seed_nano.train.pixels import SceneStream
from seed_nano.train.workspace import Workspace

QUIET = ("tensorboard", "wandb", "run_name", "log_every", "save_seconds", "save_every_steps", "keep", "async_save",
         "resume", "curves", "timeout_minutes")  # settings that change no number


class NanoTask(StageTask):
    """Stage NAME with the settings `train_NAME`."""

    def __init__(self, space: Any, name: str, module: nn.Module, stream: SceneStream | None = None) -> None:
        # Not in parallel: the losses call parts of the module past its `forward`.
        super().__init__(name, module, getattr(space.config, f"train_{name}"), parallel=False)
        self.space: Workspace = space
        self.config = {key: value for key, value in asdict(space.config).items()
                       if key in ("seed", "image_size", f"train_{name}")}
        self.quiet_keys = [f"train_{name}.{key}" for key in QUIET]
        if stream is not None:
            self.scenes = StepBatches(stream, self.settings.batch_size, seed=0, workers=space.config.workers,
                                      shuffle=False)

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        if hasattr(self, "scenes"):
            self.scenes.close()
        return {**super().finish(group), "parameters": sum(p.numel() for p in self.module.parameters())}
