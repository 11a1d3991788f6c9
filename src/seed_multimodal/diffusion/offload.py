"""Off-loading of a de-tokenizer's parts: each is on the device until the next one computes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import send_to_device
from torch import nn

from seed_multimodal.device import OffloadedWeights


class OffloadHook(ModelHook):
    """Loads a part's weights before it computes, and releases those of the part before it.

    As accelerate's `cpu_offload_with_hook`, but weights leave the device without being copied.
    """

    def __init__(self, part: nn.Module, device: torch.device, previous: OffloadHook | None) -> None:
        self.part = part.to("cpu")
        self.weights = OffloadedWeights(part, device)
        self.previous = previous
        add_hook_to_module(part, self)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Called before `forward`, and before the autoencoder's `encode` and `decode`."""
        if self.previous is not None:
            self.previous.offload()
        self.weights.load()
        device = self.weights.device
        return send_to_device(args, device), send_to_device(kwargs, device)

    def offload(self) -> None:
        """Release the weights."""
        self.weights.release()

    def remove(self) -> None:
        """End off-loading; the part is on the CPU."""
        self.offload()
        remove_hook_from_module(self.part)
