"""Linear probes of embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class LabelHeads(nn.Module):
    """Linear classifiers of an embedding, one for each label.

    `classes`: label → number of classes.
    """

    def __init__(self, width: int, classes: Mapping[str, int]) -> None:
        super().__init__()
        self.width = width
        self.classes = dict(classes)
        self.layers = nn.ModuleDict(
            {name: nn.Linear(width, count) for name, count in classes.items()}
        )

    def forward(self, embedding: Tensor) -> dict[str, Tensor]:
        """Logits `[B, classes]` of every label from embeddings `[B, E]`."""
        return {name: layer(embedding).float() for name, layer in self.layers.items()}
