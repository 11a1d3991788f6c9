"""Results that are no numbers: which weight is to blame, said in one sentence.

Weights are not looked at when they are loaded (that reads all of them): a model's user looks at its results, and asks
here when they are NaN or infinite.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from seed_multimodal.errors import CheckpointError, GenerationError, SeedError


def damaged_tensor(module: nn.Module) -> str | None:
    """The name of the first parameter or buffer that holds NaN or infinity (None: none does); it reads all of them."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def refuse_diverged(model: nn.Module, origin: Mapping[str, str], otherwise: str | Path) -> None:
    """Refuse to export NaN of a diverged training: all codes would become 0, and every comparison would pass.

    Args:
        origin: a tensor's name → the file that it came from, `otherwise` where that is not known.
    """
    name = damaged_tensor(model)
    if name is not None:
        raise CheckpointError(f"{origin.get(name, otherwise)}: {name!r} holds numbers that are not finite, so its "
                              "training has diverged; export an earlier checkpoint.")


def not_numbers(what: str, *models: nn.Module) -> SeedError:
    """The refusal of results that are NaN or infinite: it names the first tensor of the models that is.

    Args:
        what: whose results, as the sentence begins.
    """
    name = next((name for name in map(damaged_tensor, models) if name is not None), None)
    if name is not None:
        return CheckpointError(f"{what} gives no numbers: its tensor {name} holds NaN or infinity, so the checkpoint "
                               f"is damaged; get it again.")
    return GenerationError(f"{what} gives no numbers (NaN or infinity), though its weights are sound; a setting is "
                           f"too extreme for it, or float16 too narrow (use bfloat16 or float32).")
