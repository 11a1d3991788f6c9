"""Contrast of two sets of features: computed in fp32 whatever the autocast, and over all processes.

Under autocast the projections, and above all the product of unit vectors, would be rounded to half precision and then
divided by the temperature: an error of 0.004 in a cosine is one of 0.06 in a logit at 0.07.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def unit_rows(projection: nn.Linear, features: Tensor) -> Tensor:
    """`[..., D]` projected to `[..., E]` and normalised, in the precision of the projection's weights."""
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(projection(features.to(projection.weight.dtype)), dim=-1)


def similarities(rows_BE: Tensor, others_NE: Tensor) -> Tensor:
    """Scalar products `[B, N]` of rows in the precision that they come in, at least fp32."""
    rows, others = (one.float() if one.dtype.itemsize < 4 else one for one in (rows_BE, others_NE))
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ others.T


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        ctx.count = len(own)
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        first = dist.get_rank() * ctx.count
        return total[first:first + ctx.count]


def gather_rows(features: Tensor) -> Tensor:
    """Features `[B, E]` of all processes in rank order `[B · processes, E]`.

    Gradients, if `features` has any, flow back to where each row came from, summed over the processes. Every process
    must call it, with as many rows.
    """
    return _Gather.apply(features.contiguous())
