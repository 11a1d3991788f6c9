"""Weights of a diverged training are not exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from seed_multimodal.errors import CheckpointError


def refuse_diverged(model: nn.Module, origin: Mapping[str, str], otherwise: str | Path) -> None:
    """Refuse to export NaN of a diverged training: all codes would become 0, and every comparison would pass.

    Args:
        origin: a tensor's name → the file that it came from, `otherwise` where that is not known.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{origin.get(name, otherwise)}: {name!r} holds numbers that are not finite, so its "
                                  "training has diverged; export an earlier checkpoint.")
