"""Base of nano's own stages: one process, batches of training pictures by step, the count of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from seed_multimodal.training.nano.workspace import Workspace
from seed_multimodal.training.schedules import batch_indices
from seed_multimodal.training.stage import StageTask


class NanoTask(StageTask):
    """A stage NAME with the settings `train_NAME`; built on a workspace, run by `training.loop.train`."""

    def __init__(self, space: Workspace, name: str, module: nn.Module) -> None:
        # Not in parallel: the losses call parts of the module past its `forward`.
        super().__init__(name, module, self.step_loss, getattr(space.config, f"train_{name}"), parallel=False)
        self.space, self.views = space, space.views  # made now if they are not there, not under a step's autocast

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """Loss of a micro-step, and numbers to log."""
        raise NotImplementedError

    def chosen(self, micro_step: int) -> Tensor:
        """The training pictures of a micro-step: indices int64 `[B]` into the set."""
        index, settings = self.space.train_index, self.settings
        return index[batch_indices(micro_step, settings.batch_size, len(index), settings.seed)]

    def parameter_count(self) -> int:
        """Parameters of the module."""
        return sum(p.numel() for p in self.module.parameters())
