"""Which weights a run began with; `inference.batching.weights_state`: those that a process caches
results of."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from seed_multimodal.errors import SeedWarning

BLOCK = 1 << 22  # numbers: 1,024 rows of a language model with 7B parameters
SUMS = 8  # of each block, behind its size
PERIOD = 65521  # of their signs: a prime, so that no exchange of rows keeps a sum
TOLERANCE = 5e-3  # of the sums of weights that were rounded to bfloat16, relative to their size
SMALLEST = 1e-7  # float16 rounds smaller numbers to 0


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
