"""Stage `reader`: what the tower's patch features say about a scene, read by linear layers.

It tells how much of that is left after a picture has become codes (`tokenizer.py` trains with it), and names what the
layout decoder places (`layout.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.schedules import batch_indices
from seed_multimodal.vision.label_heads import LabelHeads
from seed_multimodal.weights import assign_strictly, load_state_dict, save_state_dict
from seed_nano.train.task import NanoTask
from seed_nano.train_lavit.workspace import LavitSpace
from seed_nano.world.targets import CLASSES, label_tensor

READER_FILE = "reader.safetensors"


class Reader(nn.Module):
    """Features `[B, N, D]` → `[B, N · n]`, which its heads read: one linear layer for all patches."""

    def __init__(self, patches: int, width: int, reading: int) -> None:
        super().__init__()
        self.reading = nn.Linear(width, reading)
        self.heads = LabelHeads(patches * reading, {name: len(found) for name, found in CLASSES.items()})

    def forward(self, features_BND: Tensor) -> Tensor:
        """See the class."""
        return self.reading(features_BND.float()).flatten(1)

    @torch.no_grad()
    def read_right(self, features_BND: Tensor, labels_BL: Tensor) -> dict[str, float]:
        """Share of pictures of which each label is read right, and `all`."""
        right = self.heads.right(self(features_BND), labels_BL).float()
        found = {name: round(value, 4) for name, value in zip(CLASSES, right.mean(0).tolist(), strict=True)}
        return {**found, "all": round(right.amin(1).mean().item(), 4)}


def new_reader(space: LavitSpace) -> Reader:
    """An untrained one."""
    return Reader(space.sizes.patches, space.sizes.vit.width, space.config.tokenizer.reading)


def load_reader(space: LavitSpace) -> Reader:
    """The trained one, frozen, on the device."""
    file = space.work / READER_FILE
    space.need("reader", file)
    reader = new_reader(space)
    assign_strictly(reader, load_state_dict(file), file)
    return reader.to(space.device).requires_grad_(False).eval()


class ReaderTask(NanoTask):
    """Goes to `work/reader.safetensors`."""

    sections = (*NanoTask.sections, "pool", "start")

    def __init__(self, space: LavitSpace) -> None:
        self.features, self.labels = space.features, label_tensor(space.pool)
        torch.manual_seed(space.config.seed + 2)
        self.reader = new_reader(space).to(space.device)
        super().__init__(space, "reader", self.reader)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        rows = batch_indices(micro_step, self.settings.batch_size, len(self.features), self.settings.seed)
        labels = self.labels[rows].to(self.space.device)
        read = model(self.features[rows].to(self.space.device))
        right = self.reader.heads.right(read.detach(), labels).float()
        return self.reader.heads.loss(read, labels), {"first": right[:, 0].mean(), "all": right.amin(1).mean()}

    def made(self) -> Sequence[Path]:
        return (self.space.work / READER_FILE,)

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        space, reader = self.space, self.reader.cpu().eval()
        assert isinstance(space, LavitSpace)
        save_state_dict(reader.state_dict(), space.work / READER_FILE)
        found = {split: reader.read_right(space.see(scenes), label_tensor(scenes)) for split, scenes in
                 ((split, space.held_out(split)) for split in ("val", "pairs", "styles"))}
        return {**super().finish(group), **found, "parameters": self.parameter_count()}
