"""Constraints that keep generated images well-formed, for all families.

An image is `<img>`, its codes, `</img>`; no code stands elsewhere. SEED-LLaMA: exactly 32 codes;
SEED-X: the same 64 tokens in order, of which only the hidden states count; LaVIT: 1 to 256 codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seed_multimodal.inference.request import TokenSequence
from seed_multimodal.language.vocabulary import ImageVocabulary


class ImageConstraints:
    """Forbids tokens which would break an image.

    original: forbid only those of SEED-X's image tokens that the original code forbids.
    """

    def __init__(self, vocabulary: ImageVocabulary, original: bool = False) -> None:
        self.vocabulary = vocabulary
        self.original = original

    def apply(self, scores: Tensor, sequences: Sequence[TokenSequence]) -> Tensor:
        """Scores `[B, V]` of the next tokens of `sequences`, with forbidden tokens at -inf."""
        device = scores.device
        in_image = torch.tensor([sequence.in_image for sequence in sequences], device=device)
        image_tokens = torch.tensor(
            [sequence.image_tokens for sequence in sequences], device=device
        )
        remaining = None
        if not self.original:
            budgets = [sequence.tokens_for_images for sequence in sequences]
            remaining = torch.tensor(budgets, device=device)
        return self.masked(scores, in_image, image_tokens, remaining)

    def masked(
        self, scores: Tensor, in_image: Tensor, image_tokens: Tensor, remaining: Tensor | None
    ) -> Tensor:
        """The same from the state of each row `[B]`.

        in_image: the row is inside an image. image_tokens: since its `<img>`.
        remaining: tokens left for the answer; None: unknown.
        """
        vocabulary = self.vocabulary
        needs_code = in_image & (image_tokens < vocabulary.tokens_per_image)
        n_codes = vocabulary.tokens_per_image if self.original else vocabulary.n_codes

        # 1. Inside an image only codes and `</img>` are allowed, outside no code is.
        forbidden = in_image[:, None].repeat(1, scores.shape[1])  # [B, V]
        forbidden[:, : vocabulary.ignored_below_id] = False
        allowed_codes = needs_code[:, None].expand(-1, n_codes)  # [B, n_codes]
        if vocabulary.fixed_image_order:
            position = torch.arange(n_codes, device=scores.device)
            allowed_codes = allowed_codes & (position == image_tokens[:, None])
            # These tokens are certain, but not trained: they must not cost a beam anything.
            scores = scores.masked_fill(in_image[:, None], 0.0)
        forbidden[:, vocabulary.code_start : vocabulary.code_start + n_codes] = ~allowed_codes
        if not self.original:
            forbidden[:, vocabulary.input_only_ids] = True

        # 2. An image starts only where it fits into the remaining tokens, and ends only when it is
        #    complete.
        too_short = in_image if remaining is None else remaining < vocabulary.image_length
        if vocabulary.image_only_when_forced:
            forbidden[:, vocabulary.boi_id] = ~in_image
        else:
            forbidden[:, vocabulary.boi_id] = in_image | too_short
        forbidden[:, vocabulary.eoi_id] = ~(in_image & (image_tokens >= vocabulary.min_codes))

        # 3. Padding rows of the output layer.
        forbidden[:, vocabulary.size :] = True
        return scores.masked_fill(forbidden, float("-inf"))


class ImageLogitsProcessor:
    """The constraints as a logits processor of transformers' `generate`.

    opened: the prompts end in `<img>`. budget: new tokens at most, None: unknown.
    """

    def __init__(
        self, constraints: ImageConstraints, opened: bool = False, budget: int | None = None
    ) -> None:
        self.constraints = constraints
        self.opened = opened
        self.budget = budget

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Generated ids `[B, n]`, scores `[B, V]` → scores with forbidden tokens at -inf."""
        vocabulary = self.constraints.vocabulary
        n_rows, length = input_ids.shape

        # Each row's state follows from the last `<img>` and the last `</img>`, as if it began with
        # the prompt's end.
        first_id = vocabulary.boi_id if self.opened else -1
        first = torch.full((n_rows, 1), first_id, device=input_ids.device)
        ids = torch.cat([first, input_ids], dim=1)
        positions = torch.arange(length + 1, device=input_ids.device)
        last_start = torch.where(ids == vocabulary.boi_id, positions, -1).amax(dim=1)
        last_end = torch.where(ids == vocabulary.eoi_id, positions, -1).amax(dim=1)

        remaining = None
        if self.budget is not None:
            remaining = torch.tensor(self.budget - length, device=scores.device)
        return self.constraints.masked(
            scores, last_start > last_end, length - last_start, remaining
        )
