"""Muon for the matrices inside a transformer, AdamW for the rest, as one optimiser.

Muon (Jordan 2024; `torch.optim.Muon`) orthogonalises the momentum of each hidden matrix. Embeddings, heads, norms and
biases are not maps between hidden spaces and stay with AdamW. Its steps are scaled to AdamW's size, so both parts take
one learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

OUTER_PARTS = ("embed", "lm_head", "proj_out")


class MuonWithAdamW:
    """Behaves as a `torch.optim.Optimizer` towards training loops: `param_groups`, `step`, `zero_grad`, states.

    Args:
        module: whose trainable parameters are optimised.
        outer: names that contain one of these stay with AdamW although they are matrices.
    """

    def __init__(self, module: nn.Module, lr: float, weight_decay: float, outer: Sequence[str] = OUTER_PARTS) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        inner = [p for name, p in named if p.ndim == 2 and not any(part in name for part in outer)]
        taken = {id(p) for p in inner}
        rest = [p for _, p in named if id(p) not in taken]
        self.parts: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(inner, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            "adamw": torch.optim.AdamW(
                [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
                 {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.99))}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of both parts."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        """Move all weights."""
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """States of both parts by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; another optimiser's state is a `ValueError`."""
        if set(state) != set(self.parts):
            raise ValueError(f"it holds {', '.join(state)} instead of {', '.join(self.parts)}")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
