"""Likelihoods of given continuations: the engine generates tokens of which only one is possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Likelihood:
    """Of a continuation after its prompt.

    log_probs: natural logarithm of each token's probability, given all tokens before it.
    is_greedy: whether greedy decoding would generate the continuation.
    """

    log_probs: list[float] = field(default_factory=list)
    is_greedy: bool = True

    @property
    def total(self) -> float:
        """The log-likelihood."""
        return sum(self.log_probs)

    @property
    def mean(self) -> float:
        """The log-likelihood of a token: long continuations are compared with short ones."""
        return self.total / len(self.log_probs)


class ForcedTokens:
    """The logits processor that leaves the next token of a continuation, and records its score."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids
        self.likelihood = Likelihood()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.ids[input_ids.shape[1]]  # input_ids [1, n]: those before
        log_probs = scores[0].log_softmax(dim=-1)  # [V]
        self.likelihood.log_probs.append(float(log_probs[token]))
        self.likelihood.is_greedy &= int(log_probs.argmax()) == token
        forced = torch.full_like(scores, -torch.inf)
        forced[0, token] = 0.0
        return forced
