"""Constraints that keep generated images well-formed, for all families.

An image is `<img>`, its codes, `</img>`; no code stands elsewhere. SEED-LLaMA: exactly 32 codes;
SEED-X: the same 64 tokens in order, of which only the hidden states count; LaVIT: 1 to 256 codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seed_multimodal.language.vocabulary import ImageVocabulary


class ImageConstraints:
    """A logits processor that forbids tokens which would break an image.

    opened: the prompt ends in `<img>`.
    budget: images fit into so many generated tokens; None: unknown.
    original: forbid only those of SEED-X's image tokens that the original code forbids.
    """

    def __init__(
        self,
        vocabulary: ImageVocabulary,
        opened: bool = False,
        budget: int | None = None,
        original: bool = False,
    ) -> None:
        self.vocabulary = vocabulary
        self.opened = opened
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
