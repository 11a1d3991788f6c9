"""Choice of the next token (logits processors, guidance), and ends of answers at texts.

Image constraints keep generated images well-formed, for all families. An image is `<img>`, its
codes, `</img>`; no code stands elsewhere. SEED-LLaMA: exactly 32 codes; SEED-X: the same 64 tokens
in order, of which only the hidden states count; LaVIT: 1 to 256 codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from seed_multimodal.errors import GenerationError
from seed_multimodal.inference.prompt import GenerationSettings
from seed_multimodal.language.answer import AnswerReader
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.progress import import_library

LOGITS_PROCESSORS = "transformers.generation.logits_process"
DAMAGED = (
    "The language model's scores are not numbers: its weights may be damaged, or the dtype too "
    "narrow (try --dtype float32)."
)


class LogitsProcessor(Protocol):
    """Changes the scores `[B, V]` of the tokens after `input_ids` `[B, n]`, as in transformers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor: ...


class ImageConstraints:
    """A logits processor that forbids tokens which would break an image.

    opened: the prompt ends in `<img>`.
    budget: images fit into so many generated tokens; None: unknown. 0: no images, so that the
    start of one behind a text ends the answer by `end_id`, if there is one.
    original: forbid only those of SEED-X's image tokens that the original code forbids.
    """

    def __init__(
        self,
        vocabulary: ImageVocabulary,
        opened: bool = False,
        budget: int | None = None,
        original: bool = False,
        end_id: int | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.opened = opened
        self.end_id = end_id
        self.budget = budget
        self.original = original
        n_codes = vocabulary.tokens_per_image if original else vocabulary.n_codes
        self._codes = slice(vocabulary.code_start, vocabulary.code_start + n_codes)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Generated ids `[B, n]`, scores `[B, V]` → scores with forbidden tokens at -inf."""
        rows: list[Tensor] = []
        for ids, row in zip(input_ids.tolist(), scores, strict=True):
            answer = [self.vocabulary.boi_id, *ids] if self.opened else ids
            n_tokens = self.vocabulary.tokens_in_open_image(answer)
            if n_tokens is None:
                rows.append(self._outside_image(row, len(ids)))
            else:
                rows.append(self._in_image(row, n_tokens))
        return torch.stack(rows)

    def _outside_image(self, scores: Tensor, length: int) -> Tensor:
        """Scores `[V]` without image tokens, but `<img>` where an image fits behind `length`
        tokens."""
        vocabulary = self.vocabulary
        allowed = scores.clone()
        forbidden: list[slice | int] = [self._codes, vocabulary.eoi_id]
        if not self.original:
            forbidden.append(vocabulary.input_only_ids)
        budget = None if self.original else self.budget
        fits = budget is None or budget - length >= vocabulary.image_length
        if vocabulary.image_only_when_forced or not fits:
            forbidden.append(vocabulary.boi_id)
        ends_at_image = budget == 0 and self.end_id is not None and length > 0
        if ends_at_image and not vocabulary.image_only_when_forced:
            ends = allowed[[self.end_id, vocabulary.boi_id]]
            allowed[self.end_id] = ends.logsumexp(0)
        forbidden.append(slice(vocabulary.size, None))  # padding rows of the output layer
        for ids in forbidden:
            allowed[ids] = float("-inf")
        return allowed

    def _in_image(self, scores: Tensor, n_tokens: int) -> Tensor:
        """Scores `[V]` of codes, `</img>` and ignored tokens behind `n_tokens` tokens of an
        image."""
        vocabulary = self.vocabulary
        allowed: list[slice | int] = [slice(0, vocabulary.ignored_below_id)]
        if vocabulary.image_only_when_forced:
            allowed.append(vocabulary.boi_id)
        if n_tokens >= vocabulary.min_codes:
            allowed.append(vocabulary.eoi_id)
        if vocabulary.fixed_image_order:
            # These tokens are certain, but not trained: they must not cost a beam anything.
            scores = torch.zeros_like(scores)
        if n_tokens < vocabulary.tokens_per_image:
            next_code = vocabulary.code_start + n_tokens
            allowed.append(next_code if vocabulary.fixed_image_order else self._codes)
        constrained = torch.full_like(scores, float("-inf"))
        for ids in allowed:
            constrained[ids] = scores[ids]
        return constrained


def build_processors(
    settings: GenerationSettings, end_ids: Sequence[int], device: torch.device
) -> list[LogitsProcessor]:
    """The logits processors that come after the image constraints, without sampling."""
    library = import_library(LOGITS_PROCESSORS)
    processors: list[LogitsProcessor] = []
    if settings.min_new_tokens:
        ends = list(end_ids)
        processors.append(
            library.MinNewTokensLengthLogitsProcessor(
                0, settings.min_new_tokens, ends, device=device
            )
        )
    if settings.repetition_penalty != 1:
        processors.append(library.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    return processors


def build_warpers(settings: GenerationSettings) -> list[LogitsProcessor]:
    """Processors that narrow a distribution before sampling, in transformers' order."""
    library = import_library(LOGITS_PROCESSORS)
    warpers: list[LogitsProcessor] = []
    if settings.temperature != 1:
        warpers.append(library.TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k:
        warpers.append(library.TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        warpers.append(library.TopPLogitsWarper(float(settings.top_p)))
    return warpers


def refuse_damaged(input_ids: Tensor, scores: Tensor) -> Tensor:
    """The logits processor that raises GenerationError where a row's scores are not numbers."""
    if not bool(scores.amax(dim=-1).isfinite().all()):
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
        return input_ids.new_tensor(is_done, dtype=torch.bool)

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether an answer of the tokens `ids` is complete."""
        answer = [*self._initial_ids, *ids]
        text = self._tokenizer.decode(answer)
        if not any(stop in text for stop in self._settings.stop):  # in most steps
            return False
        return read_answer(self._tokenizer, answer, self._settings).found_stop
