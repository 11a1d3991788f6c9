"""Activation checkpointing: layers keep nothing for the backward pass and are computed again then.

    checkpoint_layers(model)          # every trained layer of every ModuleList inside

Note: the backward pass runs after the training loop's choice of attention kernel has ended. The repetition must
make the tensors of the first pass (on a CPU another kernel saves other ones, which PyTorch refuses), so it runs under
the choice that held in the first pass.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


def checkpoint_layers(model: nn.Module) -> None:
    """From now on the layers in `model`'s module lists are repeated going backward; harmless if done again.

    Layers without a trained parameter are left as they are: nothing is kept for them anyway.
    """
    for layers in model.modules():
        for layer in layers if isinstance(layers, nn.ModuleList) else ():
            if not is_checkpointed(layer) and any(parameter.requires_grad for parameter in layer.parameters()):
                layer.forward = functools.partial(checkpointed, layer.forward)


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether `checkpoint_layers` has changed this layer."""
    return isinstance(layer.forward, functools.partial) and layer.forward.func is checkpointed


def checkpointed(forward: Any, *args: Any) -> Tensor:
    """`forward(*args)`, with gradients by repetition."""
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_same_attention)


def _same_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For the pass, in which the choice holds already, and for its repetition."""
    cuda = torch.backends.cuda  # its switches hold for every device
    allowed = {SDPBackend.MATH: cuda.math_sdp_enabled(), SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
               SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
               SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled()}
    chosen = [backend for backend, is_allowed in allowed.items() if is_allowed]
    return nullcontext(), nullcontext() if len(chosen) in (0, len(allowed)) else sdpa_kernel(chosen)
