"""Stage `layout`: what sampling starts from: expected latents of a picture, from the features that the decoder makes
of its codes. As nano-x's, without condition pictures; the reader's layers name what is placed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.detokenizers.layout import LayoutDecoder
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.schedules import batch_indices
from seed_nano.train.task import NanoTask
from seed_nano.train_lavit.reader import load_reader
from seed_nano.train_lavit.tokenizer import load_parts, rebuild
from seed_nano.train_lavit.workspace import LavitSpace
from seed_nano.world.targets import CLASSES, arranged_anchors, true_spots


class LayoutTask(NanoTask):
    """Goes to `work/layout`."""

    sections = (*NanoTask.sections, "pool", "drawn", "layout", "tokenizer", "start")

    def __init__(self, space: LavitSpace) -> None:
        self.out = space.work / "layout"
        self.latents, self.features = space.latents, rebuilt_features(space)
        self.spots = true_spots(space.pool[: len(self.features)])
        torch.manual_seed(space.config.seed + 4)
        self.layout = _new_layout(space, self.latents.shape[1], self.latents.shape[2]).to(space.device)
        super().__init__(space, "layout", self.layout)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        device = self.space.device
        rows = batch_indices(micro_step, self.settings.batch_size, len(self.features), self.settings.seed)
        mean = model(self.features[rows].to(device).float().flatten(1), self.spots[rows].to(device))[0]
        error = F.mse_loss(mean.float(), self.latents[rows].to(device).float())
        return error, {"error": error.detach()}

    def made(self) -> Sequence[Path]:
        return (self.out / "model.safetensors",)

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        self.layout.cpu().save_pretrained(self.out)
        return {**super().finish(group), "parameters": self.parameter_count(),
                **{key: round(value, 4) for key, value in self.meter.smooth.items()}}


def rebuilt_features(space: LavitSpace) -> Tensor:
    """What the decoder makes of the codes of the first `drawn` scenes of the pool, float16 `[d, N, D]`."""
    def make() -> Tensor:
        tokenizer, decoder = (part.to(space.device) for part in load_parts(space))
        parts = space.features[: space.config.drawn].split(1024)
        return torch.cat([rebuild(tokenizer, decoder, part.to(space.device).float()).half().cpu() for part in parts])

    return space.cached("rebuilt", "narrow", make, drawn=space.config.drawn)


def _new_layout(space: LavitSpace, channels: int, grid: int) -> LayoutDecoder:
    """An untrained layout decoder that reads and names as the reader does, for good."""
    reader, sizes, width = load_reader(space), space.config.layout, space.sizes.vit.width
    layout = LayoutDecoder(space.sizes.patches * width, channels, grid, 0,
                           {name: len(found) for name, found in CLASSES.items()}, arranged_anchors(),
                           width=sizes.width, features=sizes.features, side=sizes.side, hidden=sizes.hidden,
                           depth=sizes.depth, coarse=sizes.coarse, patch=1,
                           reading=(width, space.config.tokenizer.reading))
    for part, known in ((layout.reading, reader.reading), (layout.heads, reader.heads)):
        assert part is not None
        part.load_state_dict(known.state_dict())
        part.requires_grad_(False)
    return layout
