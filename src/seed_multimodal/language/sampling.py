"""Drawing tokens from generators of the request's own, never from torch's global random state.

`transformers` draws from the global state. Here the last logits processor draws instead and leaves only the drawn token
possible, so that `generate` (told to be greedy) takes it: nobody else's random numbers can get between the tokens of an
answer, and none of theirs are used up. The numbers are those that `torch.manual_seed(seed)` and a plain
`generate` would give for a single prompt; each prompt of a batch has a generator of its own.

Sampling with beams draws inside `generate`: there `DrawnBeams` hands the generators to `torch.multinomial` (a mode of
the calling thread only; it costs time at every operation, 38 % on nano, so it is not used without beams).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from seed_multimodal.finite import not_numbers

Processor = Callable[[Tensor, Tensor], Tensor]


def own_seed() -> int:
    """A seed for a request that names none: one number of torch's global generator of the CPU."""
    return int(torch.randint(2**63 - 1, ()))


class Draws:
    """`torch.multinomial` with a generator for each row, made on the device of the probabilities."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = seeds
        self._generators: list[torch.Generator] = []

    def __call__(self, probabilities: Tensor, count: int = 1) -> Tensor:
        """`[B, V]` -> drawn places `[B, count]`, without replacement."""
        if not self._generators:
            self._generators = [torch.Generator(probabilities.device).manual_seed(seed) for seed in self._seeds]
        return torch.cat([torch.multinomial(row[None], count, generator=generator)
                          for row, generator in zip(probabilities, self._generators, strict=True)])


class DrawnTokens:
    """The last logits processor of sampling without beams: draws a token a row and forbids all others."""

    def __init__(self, draws: Draws, temperature: float, top_k: int, top_p: float) -> None:
        self._draws = draws
        self._narrow = _warpers(temperature, top_k, top_p)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`input_ids [B, L]`, `scores [B, V]` -> 0 for the drawn token, -inf for the others."""
        narrowed = scores
        for warp in self._narrow:
            narrowed = warp(input_ids, narrowed)
        drawn = self._draws(torch.softmax(narrowed, dim=-1))
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn, 0.0)


class DrawnBeams(TorchFunctionMode):
    """Inside, `torch.multinomial` of this thread draws from the request's generators."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self._draws = draws

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.multinomial and "generator" not in kwargs:
            return self._draws(args[0], kwargs.get("num_samples", *args[1:2]))
        return function(*args, **kwargs)


class FiniteScores:
    """The first logits processor: refuses scores that are not numbers, which would otherwise become a random token, or
    on CUDA devices end the whole process."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores [B, V]`, unchanged.

        Raises:
            CheckpointError: the model's weights hold NaN or infinity (names the tensor). GenerationError: they do not.
        """
        if bool(torch.isfinite(scores.amax(dim=-1)).all()):  # NaN anywhere, or +inf, or nothing but -inf
            return scores
        raise not_numbers("The language model", self._model)


def _warpers(temperature: float, top_k: int, top_p: float) -> list[Processor]:
    """transformers' own narrowing of the scores, in the order of `generate`; what changes nothing is left out."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Processor] = []
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    return warpers
