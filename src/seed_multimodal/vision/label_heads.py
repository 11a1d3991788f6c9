"""Named linear classifiers on one embedding: how a tower is taught what stands where, and how probes read it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LabelHeads(nn.Module):
    """One linear layer for each label.

    Args:
        width: of the embedding.
        classes: label -> number of its classes.
    """

    def __init__(self, width: int, classes: Mapping[str, int]) -> None:
        super().__init__()
        self.classes = dict(classes)
        self.layers = nn.ModuleDict({name: nn.Linear(width, count) for name, count in classes.items()})

    def forward(self, embedding: Tensor) -> dict[str, Tensor]:
        """Logits `[B, classes]` of every label from embeddings `[B, E]`."""
        return {name: layer(embedding).float() for name, layer in self.layers.items()}

    def loss(self, embedding: Tensor, labels_BL: Tensor) -> Tensor:
        """Mean over the labels of the cross entropy with class numbers `[B, L]` in the order of `classes`; -100 is
        left out."""
        found = self(embedding).values()
        return torch.stack([F.cross_entropy(logits, labels_BL[:, column])
                            for column, logits in enumerate(found)]).mean()

    @torch.no_grad()
    def right(self, embedding: Tensor, labels_BL: Tensor) -> Tensor:
        """Which labels are named right, bool `[B, L]`; a label of class number -100 never is."""
        return torch.stack([logits.argmax(1) for logits in self(embedding).values()], 1) == labels_BL
