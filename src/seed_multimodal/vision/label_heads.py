"""Named linear classifiers on one embedding: how a tower is taught what stands where, and how probes read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import CheckpointError
from seed_multimodal.weights import assign_strictly, load_state_dict


class LabelHeads(nn.Module):
    """One linear layer for each label.

    Args:
        width: of the embedding.
        classes: label -> number of its classes.
    """

    def __init__(self, width: int, classes: Mapping[str, int]) -> None:
        super().__init__()
        self.width, self.classes = width, dict(classes)
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

    def divergence(self, embedding: Tensor, teacher: Tensor) -> Tensor:
        """Mean over the labels of the KL divergence `[B]` of what is read from embeddings `[B, E]`, from what is read
        from the `teacher`'s, which get no gradient; in fp32."""
        with torch.autocast(embedding.device.type, enabled=False):
            with torch.no_grad():
                wanted = self(teacher.float())
            found = self(embedding.float())
            return torch.stack([F.kl_div(found[name].log_softmax(1), wanted[name].softmax(1), reduction="none").sum(1)
                                for name in found]).mean(0)

    @classmethod
    def load(cls, file: str | Path, labels: Sequence[str] | None = None) -> LabelHeads:
        """Frozen heads from their state dict, which shows the sizes.

        Args:
            labels: the order of the heads, which a file does not keep (None: any).

        Raises:
            CheckpointError: the file is not there, damaged, or holds something else, or heads of other labels.
        """
        state = load_state_dict(file)
        shapes = {name.split(".")[1]: tuple(value.shape) for name, value in state.items()
                  if name.startswith("layers.") and name.count(".") == 2 and value.ndim == 2}
        if not shapes:
            raise CheckpointError(f"{file}: holds no label heads (layers.NAME.weight); its first tensor is "
                                  f"{next(iter(state), 'none')!r}.")
        if labels is not None and set(labels) != set(shapes):
            raise CheckpointError(f"{file}: its heads name {', '.join(sorted(shapes))}, not {', '.join(labels)}.")
        heads = cls(next(iter(shapes.values()))[1], {name: shapes[name][0] for name in labels or shapes})
        assign_strictly(heads, state, file)
        return heads.requires_grad_(False).eval()

    @torch.no_grad()
    def right(self, embedding: Tensor, labels_BL: Tensor) -> Tensor:
        """Which labels are named right, bool `[B, L]`; a label of class number -100 never is."""
        return torch.stack([logits.argmax(1) for logits in self(embedding).values()], 1) == labels_BL
