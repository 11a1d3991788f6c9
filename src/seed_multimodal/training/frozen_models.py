"""Frozen models of a training: features of pixels, and label heads as teachers of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from seed_multimodal.device import copy_to
from seed_multimodal.nn.label_heads import LabelHeads
from seed_multimodal.state_dicts import assign_strictly, fingerprint, load_state_dict


class FrozenFeatures:
    """uint8 pixels `[N, 3, S, S]` on the CPU → features `[N, ...]` on the device, without
    gradients.

    compute: pixels on the device → features.
    batch_size: images per forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        compute: Callable[[Tensor], Tensor],
        batch_size: int = 16,
    ) -> None:
        self.model = model.requires_grad_(False).eval().to(device)
        self.device = device
        self.compute = compute
        self.batch_size = batch_size
        self.fingerprint = fingerprint(model)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        batches = pixels.split(self.batch_size)
        return torch.cat([self.compute(copy_to(self.device, batch)) for batch in batches])


def load_label_heads(file: str | Path, labels: Sequence[str] | None = None) -> LabelHeads:
    """Frozen heads from a file, in the order of `labels`, which the file does not store.

    Raises CheckpointError: tensors of other heads.
    """
    state = load_state_dict(file)
    # The file has `layers.LABEL.weight` [classes, width] and a bias for each label.
    shapes = {
        name.split(".")[1]: value.shape for name, value in state.items() if name.endswith(".weight")
    }
    width = next(iter(shapes.values()))[1]
    heads = LabelHeads(width, {label: shapes[label][0] for label in labels or shapes})
    assign_strictly(heads, state, file)
    return heads.requires_grad_(False).eval()
