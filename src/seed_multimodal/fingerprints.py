"""Which weights a module has: `weights_state` for what one process caches, `fingerprint` for what a
run stores."""

from __future__ import annotations

import functools
import math
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from seed_multimodal.errors import SeedWarning

SHARE = 0.9  # of a matrix's shorter side: the distance of two sampled numbers
# Attributes of PEFT's layers.
ADAPTER_SWITCHES = ("_disable_adapters", "_active_adapter", "scaling")

BLOCK = 1 << 22  # numbers: 1,024 rows of a language model with 7B parameters
SUMS = 8  # of each block, behind its size
PERIOD = 65521  # of their signs: a prime, so that no exchange of rows keeps a sum
TOLERANCE = 5e-3  # of the sums of weights that were rounded to bfloat16, relative to their size
SMALLEST = 1e-7  # float16 rounds smaller numbers to 0


# ---- in a process


@torch.no_grad()
def weights_state(module: nn.Module) -> object:
    """A value that changes with the weights, and that switched adapters and hooks change.

    It has what torch counts (changes in place, other tensors, layers and hooks) and, for changes
    through `.data`, numbers of each row and each column of every matrix. Not seen are changes of
    single numbers through `.data`, and of what hooks hold.
    """
    # 1. Layers, and what can be switched on and off.
    layers: list[nn.Module | None] = [module]
    tensors: list[Tensor | None] = []
    state: list[object] = []
    for layer in layers:  # which grows
        if layer is None:
            continue
        layers += layer._modules.values()
        tensors += layer._parameters.values()
        tensors += layer._buffers.values()
        if layer._forward_pre_hooks or layer._forward_hooks:
            state += [*layer._forward_pre_hooks, *layer._forward_hooks]
        if "_disable_adapters" in layer.__dict__:
            state.append(str([layer.__dict__.get(name) for name in ADAPTER_SWITCHES]))
    state += map(id, layers)

    # 2. Counters and numbers of the tensors; those of a group are joined quickly.
    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        if tensor is None or type(tensor) not in (nn.Parameter, Tensor):  # of quantized weights
            state.append(id(tensor))
            continue
        state.append(tensor.data_ptr())
        state.append(0 if tensor.is_inference() else tensor._version)
        samples = _samples(tensor.shape)
        if samples and tensor.is_contiguous():
            tensor = tensor.as_strided(*samples)
        elif tensor.ndim != 1:
            tensor = tensor.flatten()
        group = (tensor.get_device(), tensor.dtype, samples is None)
        groups.setdefault(group, []).append(tensor)
    joined = [torch.cat(samples).view(torch.uint8) for samples in groups.values()]
    return state, [numbers.cpu().numpy().tobytes() for numbers in joined]


@functools.cache
def _samples(shape: torch.Size) -> tuple[tuple[int], tuple[int]] | None:
    """The size and the stride of the sampled numbers of a tensor; None: all of a vector."""
    if len(shape) < 2 or not shape.numel():
        return None
    # Below both sides, so that no row is left out; prime to the width, so that no column is.
    width = shape[-1]
    step = max(int(SHARE * min(width, shape.numel() // width)), 1)
    while math.gcd(step, width) > 1:
        step -= 1
    return (math.ceil(shape.numel() / step),), (step,)


# ---- in files


@torch.no_grad()
def fingerprint(model: nn.Module, *, frozen: bool = False) -> str:
    """Sums over blocks of all parameters and saved buffers, for `same_fingerprint`; `frozen`: of
    frozen parameters only. 36 characters a block."""
    signs = torch.randint(2, (PERIOD, SUMS), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    rows: list[Tensor] = []
    for tensor in model.state_dict(keep_vars=True).values():
        is_frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if not tensor.numel() or (frozen and not is_frozen):
            continue
        signs = signs.to(tensor.device)
        for block in tensor.detach().flatten().split(BLOCK):
            # By position, so that rounding errors do not add up, and exchanged rows differ.
            folded = torch.zeros(PERIOD, device=block.device)
            for part in block.split(PERIOD):
                folded[: len(part)].add_(part)
            folded /= math.sqrt(len(block))
            rows.append(torch.cat([folded.norm()[None], folded @ signs]).half())
    return b"".join(row.cpu().numpy().tobytes() for row in rows).hex()


def same_fingerprint(before: object, now: str) -> bool:
    """Whether two fingerprints are of the same weights, up to rounding to 16 bits: one replaced row
    is another base. Earlier versions kept four numbers of each tensor: a warning."""
    if not isinstance(before, str):
        warnings.warn(
            "The checkpoint is of an earlier version, which kept too little of the frozen weights "
            "to compare them: make sure that they have not changed.",
            SeedWarning,
            stacklevel=2,
        )
        return True
    if len(before) != len(now):
        return False
    values = [np.frombuffer(bytes.fromhex(text), np.float16) for text in (before, now)]
    saved, current = np.nan_to_num(values).astype(float).reshape(2, -1, 1 + SUMS)
    distances = np.linalg.norm(saved - current, axis=1)
    return bool((distances <= TOLERANCE * SUMS**0.5 * saved[:, 0] + SMALLEST).all())
