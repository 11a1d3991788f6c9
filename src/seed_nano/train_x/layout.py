"""Stage `layout`: what sampling starts from: the expected latents of a picture, from the tower's features of it and,
for edits, the latents of the picture before.

As in nano (`training/nano/unet.py`) things are told their true spots while it is trained, and stand at their anchors in
use. Beside a condition picture a thing that stays is put at its anchor in training, too, since its spot is seen there.
Noise on the features stands for the errors of a language model that writes them.
"""

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
from seed_nano.train.clip import HEADS_FILE, load_label_heads
from seed_nano.train.task import NanoTask
from seed_nano.train.vae import latents
from seed_nano.train_x.tower import features
from seed_nano.train_x.workspace import XWorkspace
from seed_nano.world.scene import Scene, anchors, slots
from seed_nano.world.targets import CLASSES, arranged_anchors, true_spots

NOISE = 0.35  # most, of features of unit variance
ITSELF = 0.15  # share of the conditions that are the very picture
KEEPS = 32  # width of what decides where a condition stays


class LayoutTask(NanoTask):
    """Stage `layout`: goes to `work/layout`."""

    sections = (*NanoTask.sections, "pool", "layout", "tower", "start")

    def __init__(self, space: XWorkspace) -> None:
        self.out = space.work / "layout"
        self.latents, self.features = latents(space), features(space).flatten(1)
        self.spots, self.kept = true_spots(space.pool), kept_spots(space.edits)
        torch.manual_seed(space.config.seed + 3)
        layout = build_layout(space, self.latents.shape[1], self.latents.shape[2], self.features.shape[1])
        layout.heads.requires_grad_(False)
        self.layout = layout.to(space.device)
        super().__init__(space, "layout", self.layout)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """Half of the samples alone, half beside the picture before the edit."""
        settings, device = self.settings, self.space.device
        count = settings.batch_size
        rows = batch_indices(micro_step, count, len(self.features), settings.seed)
        after = rows[: count // 2] | 1  # an edit's result has the odd number
        before = torch.where(torch.rand(len(after)) < ITSELF, after, after - 1)
        rows = torch.cat([after, rows[len(after):]])
        spots = torch.cat([self.kept[after // 2], self.spots[rows[len(after):]]])
        told = self.features[rows].float()
        told = told + NOISE * torch.rand(count, 1) * torch.randn_like(told)
        condition = torch.zeros(count, *self.latents.shape[1:])
        condition[: len(after)] = self.latents[before].float()
        wanted = self.latents[rows].float().to(device)
        mean = model(told.to(device), spots.to(device), condition.to(device))[0]
        errors = F.mse_loss(mean.float(), wanted, reduction="none").flatten(1).mean(1)
        beside, alone = errors[: len(after)].mean(), errors[len(after):].mean()
        return beside + alone, {"beside": beside.detach(), "alone": alone.detach()}

    def made(self) -> Sequence[Path]:
        return (self.out / "model.safetensors",)

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        self.layout.cpu().save_pretrained(self.out)
        return {**super().finish(group), "parameters": self.parameter_count(),
                **{key: round(value, 4) for key, value in self.meter.smooth.items()}}


def build_layout(space: XWorkspace, channels: int, grid: int, width: int) -> LayoutDecoder:
    """An untrained layout decoder whose heads are those of the tower."""
    space.need("tower", space.work / HEADS_FILE)
    heads, sizes = load_label_heads(space.work / HEADS_FILE), space.config.layout
    layout = LayoutDecoder(width, channels, grid, 0, {name: len(found) for name, found in CLASSES.items()},
                           arranged_anchors(), keeps=KEEPS, width=sizes.width, features=sizes.features,
                           side=sizes.side, hidden=sizes.hidden, depth=sizes.depth, coarse=sizes.coarse, patch=1)
    layout.heads.load_state_dict(heads.state_dict())
    return layout


def kept_spots(edits: Sequence[tuple[Scene, Scene]]) -> Tensor:
    """As `true_spots` of the pictures after an edit, but things that stay stand at their anchors: [N, K, 4]."""
    found = true_spots([after for _, after in edits])
    for row, (before, after) in enumerate(edits):
        if before.style != after.style:
            continue
        there = {(slot.thing, x, y, side) for slot, (_, x, y, side) in
                 zip(slots(before), anchors(before.layout, before.counts), strict=True)}
        for place, (kind, x, y, side) in enumerate(anchors(after.layout, after.counts)):
            if (after.things[kind], x, y, side) in there:
                found[row, place] = torch.tensor([kind, x, y, side])
    return found
