"""Likelihoods: of given continuations, and of the tokens that were chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation after its prompt.

    log_probs: natural logarithm of each token's probability, given all tokens before it.
    is_greedy: whether greedy decoding would generate the continuation.
    """

    log_probs: Sequence[float]
    is_greedy: bool

    @property
    def total(self) -> float:
        """The log-likelihood."""
        return sum(self.log_probs)

    @property
    def mean(self) -> float:
        """The log-likelihood of a token: long continuations are compared with short ones."""
        return self.total / len(self.log_probs)


@dataclass(frozen=True)
class SampledAnswer:
    """An answer for training by rewards.

    ids: the generated tokens, without those that the prompt holds.
    log_probs: natural logarithm of each token's probability in the distribution from which it was
    chosen: after guidance, image constraints, penalties, temperature, top-k and top-p; of greedy
    answers the same at temperature 1.
    """

    ids: Sequence[int]
    log_probs: Sequence[float]
