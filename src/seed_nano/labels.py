"""Label heads: linear probes of embeddings, and teachers of other embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.state_dicts import assign_strictly, load_state_dict


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
    heads.requires_grad_(False)
    heads.eval()
    return heads


def label_divergence(heads: LabelHeads, embedding: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence `[B]` of the embedding's labels from the teacher's, fp32, averaged over the
    labels.

    No gradient flows into `teacher`.
    """
    with torch.autocast(embedding.device.type, enabled=False):
        with torch.no_grad():
            targets = heads(teacher.float())
        predictions = heads(embedding.float())
        divergences = []
        for label, logits in predictions.items():
            target = targets[label].softmax(1)  # [B, classes]
            divergence = F.kl_div(logits.log_softmax(1), target, reduction="none")
            divergences.append(divergence.sum(1))
        return torch.stack(divergences).mean(0)
