"""Stages `layout` of nano-x and nano-lavit: the expected latents of an image, which sampling starts from.

nano-x: from the vision encoder's features and, for edits, the latents of the image before; nano-lavit: from features
decoded from codes. In training things are placed at their true spots, in use at their anchors; a thing that an edit
keeps is placed at its anchor in training, too, since the condition image shows its spot. Noise on nano-x's features
stands for the errors of the language model that generates them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.detokenizers.layout import LayoutDecoder
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.schedules import batch_indices
from seed_nano.train.lavit import load_reader, rebuilt_features
from seed_nano.train.task import NanoTask
from seed_nano.train.vae import latents
from seed_nano.train.vision import HEADS_FILE, LABELS, load_label_heads, pool_features
from seed_nano.train.workspace import LavitWorkspace, XWorkspace
from seed_nano.world.scene import Scene, anchors
from seed_nano.world.targets import arranged_anchors, true_spots

NOISE = 0.35  # most, of features of unit variance
ITSELF = 0.15  # share of the conditions that are the image itself
KEEPS = 32  # width of what decides where a condition stays


class LayoutTask(NanoTask):
    """Goes to `{work}/layout`."""

    latents: Tensor
    features: Tensor

    def build(self, space: Any, seed: int, known: Callable[[], Mapping[str, nn.Module]], **sizes: Any) -> None:
        """Build the layout decoder; its parts in `known` have those weights and are not trained."""
        torch.manual_seed(space.config.seed + seed)
        layout, parts = space.config.layout, known()
        self.layout = LayoutDecoder(
            self.features[0].numel(), self.latents.shape[1], self.latents.shape[2], 0, LABELS, arranged_anchors(),
            width=layout.width, features=layout.features, side=layout.side, hidden=layout.hidden, depth=layout.depth,
            coarse=layout.coarse, patch=1, **sizes).to(space.device)
        for name, part in parts.items():
            own = getattr(self.layout, name)
            own.load_state_dict(part.state_dict())
            own.requires_grad_(False)
        NanoTask.__init__(self, space, "layout", self.layout)

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        self.layout.cpu().save_pretrained(self.space.work / "layout")
        return {**super().finish(group), **{key: round(value, 4) for key, value in self.meter.smooth.items()}}


class XLayoutTask(LayoutTask):
    """nano-x's."""

    def __init__(self, space: XWorkspace) -> None:
        self.latents, self.features = latents(space), pool_features(space).flatten(1)
        self.spots, self.kept = true_spots(space.pool), kept_spots(space.edits)
        self.build(space, 3, lambda: {"heads": load_label_heads(space.work / HEADS_FILE)}, keeps=KEEPS)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """Half of the samples alone, half with the image before the edit as condition."""
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


class LavitLayoutTask(LayoutTask):
    """nano-lavit's."""

    def __init__(self, space: LavitWorkspace) -> None:
        self.latents, self.features = latents(space), rebuilt_features(space)
        self.spots = true_spots(space.pool[: len(self.features)])
        reading = space.sizes.vit.width, space.config.tokenizer.reading
        self.build(space, 4, lambda: dict(load_reader(space).named_children()), reading=reading)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        device = self.space.device
        rows = batch_indices(micro_step, self.settings.batch_size, len(self.features), self.settings.seed)
        mean = model(self.features[rows].to(device).float().flatten(1), self.spots[rows].to(device))[0]
        error = F.mse_loss(mean.float(), self.latents[rows].to(device).float())
        return error, {"error": error.detach()}


def kept_spots(edits: Sequence[tuple[Scene, Scene]]) -> Tensor:
    """As `true_spots` of the pictures after an edit, but things that stay stand at their anchors: [N, K, 4]."""
    found = true_spots([after for _, after in edits])
    for row, (before, after) in enumerate(edits):
        if before.style != after.style:
            continue
        there = {(slot.thing, x, y, side) for slot, (_, x, y, side) in
                 zip(before.slots(), anchors(before.layout, before.counts), strict=True)}
        for place, (kind, x, y, side) in enumerate(anchors(after.layout, after.counts)):
            if (after.things[kind], x, y, side) in there:
                found[row, place] = torch.tensor([kind, x, y, side])
    return found
