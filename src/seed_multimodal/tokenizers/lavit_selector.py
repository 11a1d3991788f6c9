"""LaVIT's selector: which patches of a picture become tokens.

A small network gives each patch the probability of being kept; a hard draw decides. Note: the released model draws when
it runs, too (Gumbel noise at temperature 1: each patch is kept independently with its probability), so its tokens
differ from call to call unless the noise is seeded. `mode="threshold"` keeps the patches with p > 0.5 instead: nothing
is random, but it is not what the model was trained with.

    selection = choose(selector(features), mode="draw", generator=torch.Generator().manual_seed(1))

Source: specification §1.3 and §2.2; parameter names are the released ones. Shape suffixes: B batch, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.layers import LayerNorm

MODES = ("draw", "threshold")
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Selection:
    """The decision about each patch.

    Attributes:
        log_probs_BN2: log of the probability of (keep, drop), fp32.
        keep_BN: 1 kept, 0 dropped, fp32; its gradient is that of the soft decision.
    """

    log_probs_BN2: Tensor
    keep_BN: Tensor

    @property
    def p_keep_BN(self) -> Tensor:
        """Probability of being kept."""
        return self.log_probs_BN2[..., 0].exp()

    @property
    def counts_B(self) -> Tensor:
        """Kept patches of each picture, int64."""
        return self.keep_BN.detach().sum(1).round().long()


class Selector(nn.Module):
    """Half of the channels stay each patch's own, the other half is replaced by its mean over the picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 4:
            raise ConfigError(f"The selector halves its width twice: {width} is not a multiple of 4.")
        self.in_conv = nn.Sequential(LayerNorm(width, eps=1e-5), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4),
                                      nn.GELU(), nn.Linear(width // 4, 2), nn.LogSoftmax(dim=-1))

    def forward(self, x_BND: Tensor, policy_BN1: Tensor | None = None) -> Tensor:
        """Patch features `[B, N, D]` → log-probabilities `[B, N, 2]`, index 0 = keep, fp32.

        Args:
            policy_BN1: weights of the patches in the mean; all alike if not given.
        """
        own, shared = self.in_conv(x_BND.float()).chunk(2, dim=-1)
        policy_BN1 = torch.ones_like(shared[..., :1], dtype=torch.float32) if policy_BN1 is None else policy_BN1
        mean = (shared.float() * policy_BN1).sum(1, True) / policy_BN1.sum(1, True)
        return self.out_conv(torch.cat([own, mean.to(own.dtype).expand_as(own)], dim=-1)).float()


def choose(log_probs_BN2: Tensor, *, mode: str = "draw", generator: Generators = None, noise: Tensor | None = None,
           allow_empty: bool = False) -> Selection:
    """The hard decision, with the gradient of the soft one.

    Args:
        mode: `draw` (released) or `threshold` (p_keep > 0.5).
        generator: of the noise: one for the batch, or one for each picture, which makes a picture's tokens independent
            of the batch it is in; None: torch's global one, as released.
        noise: Gumbel noise `[B, N, 2]` to use instead of a draw.
        allow_empty: a picture may keep no patch, as released. Otherwise it keeps its most probable one: a picture
            without tokens has no place in a prompt and nothing to decode.

    Raises:
        ConfigError: another mode, or a number of generators that is not the number of pictures.
    """
    if mode not in MODES:
        raise ConfigError(f"Unknown selection {mode!r}: use {' or '.join(MODES)}.")
    log_probs_BN2 = log_probs_BN2.float()
    if mode == "draw":
        keep_BN = draw(log_probs_BN2, noise=noise, generator=generator)
    else:
        soft_BN = log_probs_BN2[..., 0].exp()
        keep_BN = straight_through((soft_BN > 0.5).float(), soft_BN)
    if not allow_empty:
        keep_BN = keep_BN + _one_at_least(keep_BN.detach(), log_probs_BN2.detach())
    return Selection(log_probs_BN2, keep_BN)


def draw(log_probs_BN2: Tensor, *, noise: Tensor | None = None, generator: Generators = None) -> Tensor:
    """Hard Gumbel-softmax of temperature 1: `[B, N, 2]` → kept `[B, N]`, 1 or 0, the gradient straight through."""
    if noise is None:
        noise = gumbel_noise(log_probs_BN2.shape, log_probs_BN2.device, generator)
    noisy = log_probs_BN2 + noise.to(log_probs_BN2)
    return straight_through((noisy.argmax(-1) == 0).float(), F.softmax(noisy, dim=-1)[..., 0])


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard` exactly, with the gradient of `soft`."""
    return hard + (soft - soft.detach()) if soft.requires_grad else hard


def gumbel_noise(shape: Sequence[int], device: torch.device, generator: Generators = None) -> Tensor:
    """Standard Gumbel noise, fp32, in the order in which `torch.nn.functional.gumbel_softmax` draws it.

    Raises:
        ConfigError: a number of generators that is not `shape[0]`.
    """
    if generator is None or isinstance(generator, torch.Generator):
        place = device if generator is None else generator.device
        waits = torch.empty(tuple(shape), device=place).exponential_(generator=generator)
        return -waits.clamp_min_(torch.finfo(waits.dtype).tiny).log().to(device)
    if len(generator) != shape[0]:
        raise ConfigError(f"{len(generator)} generators for {shape[0]} pictures: give one for each, or one for all.")
    return torch.stack([gumbel_noise(shape[1:], device, one) for one in generator])


def _one_at_least(keep_BN: Tensor, log_probs_BN2: Tensor) -> Tensor:
    """1 at the most probable patch of each picture that keeps none, else 0."""
    best_BN = F.one_hot(log_probs_BN2[..., 0].argmax(1), keep_BN.shape[1])
    return best_BN.to(keep_BN) * (keep_BN.sum(1, keepdim=True) == 0)
