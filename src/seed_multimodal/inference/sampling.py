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


class TokenChooser:
    """The last logits processor of a request: chooses one token and forbids all others.

    seed: samples what transformers' `generate` samples after `torch.manual_seed(seed)`; None:
        chooses the likeliest token.
    forced_ids: the tokens to choose instead.
    records: writes `log_probs`, the natural logarithm of each chosen token's probability, and
        `is_greedy`: whether each one was the likeliest.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        seed: int | None,
        device: torch.device,
        forced_ids: Sequence[int] | None = None,
        records: bool = False,
    ) -> None:
        self.records = records
        self.forced_ids = forced_ids
        self.generator: torch.Generator | None = None
        self.warpers: list[LogitsProcessor] = []
        if seed is not None:
            self.generator = torch.Generator(device).manual_seed(seed)
            self.warpers = build_warpers(settings)
        self.log_probs: list[float] = []
        self.is_greedy = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` `[1, V]` → 0 for the chosen token, -inf for the others."""
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        if self.forced_ids is not None:
            forced_id = self.forced_ids[input_ids.shape[1]]
            token = torch.tensor([[forced_id]], device=scores.device)  # [1, 1]
        elif self.generator is not None:
            token = torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator)
        else:
            token = scores.argmax(dim=-1, keepdim=True)
        if self.records:
            self.log_probs.append(scores.log_softmax(dim=-1)[0, token].item())
            self.is_greedy &= bool(token == scores.argmax(dim=-1))
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
