"""Choice of the next token: logits processors, and sampling with a generator for each request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from seed_multimodal.errors import GenerationError
from seed_multimodal.inference.prompt import GenerationSettings


class LogitsProcessor(Protocol):
    """Changes the scores `[B, V]` of the tokens after `input_ids` `[B, n]`, as in transformers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor: ...


def build_processors(
    settings: GenerationSettings, end_ids: Sequence[int], device: torch.device
) -> list[LogitsProcessor]:
    """The logits processors that come after the image constraints, without sampling."""
    from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

    processors: list[LogitsProcessor] = []
    if settings.min_new_tokens:
        ends = list(end_ids)
        processors.append(
            MinNewTokensLengthLogitsProcessor(0, settings.min_new_tokens, ends, device=device)
        )
    if settings.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    return processors


def build_warpers(settings: GenerationSettings) -> list[LogitsProcessor]:
    """Processors that narrow a distribution before sampling, in transformers' order."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[LogitsProcessor] = []
    if settings.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(float(settings.top_p)))
    return warpers


class SeededSampler:
    """The last logits processor of a sampled request: samples one token and forbids all others.

    It has a generator of its own, and samples what transformers' `generate` samples after
    `torch.manual_seed(seed)`.
    """

    def __init__(self, seed: int, settings: GenerationSettings, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.warpers = build_warpers(settings)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` `[1, V]` → 0 for the sampled token, -inf for the others."""
        warped = scores
        for warper in self.warpers:
            warped = warper(input_ids, warped)
        token = torch.multinomial(warped.softmax(dim=-1), 1, generator=self.generator)  # [1, 1]
        return torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)


def refuse_damaged(input_ids: Tensor, scores: Tensor) -> Tensor:
    """The logits processor that raises `not_finite_error` for scores `[B, V]`."""
    if not torch.isfinite(scores.amax(dim=-1)).all():
        raise not_finite_error()
    return scores


def not_finite_error() -> GenerationError:
    """For scores that are NaN, which would crash a CUDA process when a token is sampled."""
    return GenerationError(
        "The language model's scores are not numbers: its weights may be damaged, or the dtype "
        "too narrow (try --dtype float32)."
    )
