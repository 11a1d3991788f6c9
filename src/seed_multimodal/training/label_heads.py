"""Frozen label heads as teachers of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from seed_multimodal.diffusion.layout import LabelHeads
from seed_multimodal.weights import assign_strictly, load_state_dict


def load_label_heads(file: str | Path, labels: Sequence[str] | None = None) -> LabelHeads:
    """Frozen heads from a file; `labels`: their order, which the file does not store. Raises CheckpointError."""
    state = load_state_dict(file)
    sizes = {
        name.split(".")[1]: value.shape for name, value in state.items() if name.endswith(".weight")
    }
    heads = LabelHeads(
        next(iter(sizes.values()))[1], {name: sizes[name][0] for name in labels or sizes}
    )
    assign_strictly(heads, state, file)
    return heads.requires_grad_(False).eval()


def label_divergence(heads: LabelHeads, embedding: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence `[B]` of the embeddings' labels from the teacher's (no gradient); mean over labels, fp32."""
    with torch.autocast(embedding.device.type, enabled=False):
        with torch.no_grad():
            target = heads(teacher.float())
        return torch.stack(
            [
                F.kl_div(logits.log_softmax(1), target[name].softmax(1), reduction="none").sum(1)
                for name, logits in heads(embedding.float()).items()
            ]
        ).mean(0)
