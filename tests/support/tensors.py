"""Tensors of random numbers, and comparing state dicts."""

from collections.abc import Mapping

import torch
from torch import Tensor


def equal(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether `others` has each of the tensors, to the bit."""
    return all(torch.equal(value, others[name]) for name, value in tensors.items())


def normal(seed, *shape: int) -> Tensor:
    """Normal numbers, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
