"""Base of nano's own stages: one process, batches of training pictures by step, the count of parameters."""

from __future__ import annotations

from torch import Tensor, nn

from seed_multimodal.training.nano.workspace import Workspace
from seed_multimodal.training.schedules import batch_indices
from seed_multimodal.training.stage import StageTask


class NanoTask(StageTask):
    """A stage NAME with the settings `train_NAME`; built on a workspace, run by `training.loop.train`."""

    def __init__(self, space: Workspace, name: str, module: nn.Module) -> None:
        # Not in parallel: the losses call parts of the module past its `forward`.
        super().__init__(name, module, getattr(space.config, f"train_{name}"), parallel=False)
        self.space, self.views = space, space.views  # made now if they are not there, not under a step's autocast

    def chosen(self, micro_step: int) -> Tensor:
        """The training pictures of a micro-step: indices int64 `[B]` into the set."""
        index, settings = self.space.train_index, self.settings
        return index[batch_indices(micro_step, settings.batch_size, len(index), settings.seed)]

    def parameter_count(self) -> int:
        """Parameters of the module."""
        return sum(p.numel() for p in self.module.parameters())
