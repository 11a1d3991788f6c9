"""Base of nano's own stages: one process, batches of training scenes by step, the count of parameters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from seed_multimodal.disk import writing
from seed_multimodal.training.checkpoint_folders import checkpoints
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.stage import StageTask, train_stage
from seed_nano.train.scenes import SceneStream, scene_batches
from seed_nano.train.workspace import Workspace

_QUIET = ("tensorboard", "wandb", "run_name", "log_every", "save_seconds", "save_every_steps", "keep", "async_save",
          "resume", "curves", "timeout_minutes")  # they change no number


class NanoTask(StageTask):
    """A stage NAME with the settings `train_NAME`; built on a workspace, run by `training.loop.train`.

    Attributes:
        sections: settings that its numbers follow from, beside `train_NAME`.
    """

    sections: tuple[str, ...] = ("seed", "image_size")

    def __init__(self, space: Workspace, name: str, module: nn.Module) -> None:
        # Not in parallel: the losses call parts of the module past its `forward`.
        super().__init__(name, module, getattr(space.config, f"train_{name}"), parallel=False)
        self.space = space
        self.config = {key: value for key, value in asdict(space.config).items()
                       if key in (*self.sections, f"train_{name}")}
        self.quiet_keys = [f"train_{name}.{key}" for key in _QUIET]

    def made(self) -> Sequence[Path]:
        """Files that `finish` writes for later stages."""
        return ()

    def train(self) -> dict[str, Any]:
        """Run the stage; returns its record. One that is done, but whose files are gone or belong into another folder
        than before, is finished again from its last checkpoint."""
        home = self.space.work
        file = home / self.record_file
        gone = next((one for one in self.made() if not one.is_file()), None)
        if gone is None or not file.is_file():
            return train_stage(self, home)
        print(f"[{self.name}] {gone} is not there, so the stage is finished again.", flush=True)
        saved, times = checkpoints(home / self.checkpoint_folder)[:1], file.stat()
        with writing(file):
            file.unlink()
        record = train_stage(self, home)
        if saved and saved[0][0] == record["steps"]:  # the same weights: what was built on them is not older
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        return record

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
