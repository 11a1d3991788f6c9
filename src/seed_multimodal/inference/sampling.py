"""Choice of the next token (logits processors, guidance), and ends of answers at texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from seed_multimodal.errors import GenerationError
from seed_multimodal.inference.prompt import GenerationSettings
from seed_multimodal.language.answer import AnswerReader
from seed_multimodal.language.text_tokenizer import TextTokenizer

DAMAGED = (
    "The language model's scores are not numbers: its weights may be damaged, or the dtype too "
    "narrow (try --dtype float32)."
)


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


def are_numbers(scores: Tensor) -> list[bool]:
    """Whether each row of scores `[B, V]` has a finite maximum: NaN would crash a CUDA process when
    a token is sampled."""
    is_finite: list[bool] = scores.amax(dim=-1).isfinite().tolist()
    return is_finite


def refuse_damaged(input_ids: Tensor, scores: Tensor) -> Tensor:
    """The logits processor that raises GenerationError where a row's scores are not numbers."""
    if not all(are_numbers(scores)):
        raise GenerationError(DAMAGED)
    return scores


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance on scores `[B, V]`, as in transformers."""
    conditional = conditional.log_softmax(dim=-1)
    unconditional = unconditional.log_softmax(dim=-1)
    return guidance * (conditional - unconditional) + unconditional


# ---- ends at texts


def read_answer(
    tokenizer: TextTokenizer, ids: Sequence[int], settings: GenerationSettings
) -> AnswerReader:
    """The reader of a complete answer, which ends at the stops of `settings`."""
    reader = AnswerReader(tokenizer, settings.stop, stop_after=settings.stop_after)
    return reader.read_all(ids)


class StopTexts:
    """Stopping criterion of transformers' `generate`: ends rows at one of the settings' stops."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        settings: GenerationSettings,
        initial_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._initial_ids = list(initial_ids)

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """Whether each row of generated ids `[B, n]` is complete."""
        is_done = [self.ends(ids) for ids in input_ids.tolist()]
        return torch.tensor(is_done, device=input_ids.device)

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether an answer of the tokens `ids` is complete."""
        answer = [*self._initial_ids, *ids]
        text = self._tokenizer.decode(answer)
        if not any(stop in text for stop in self._settings.stop):  # in most steps
            return False
        return read_answer(self._tokenizer, answer, self._settings).found_stop
