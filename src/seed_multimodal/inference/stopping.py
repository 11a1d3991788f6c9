"""Ends of beams, and of answers by transformers, by texts (`GenerationSettings.stop`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seed_multimodal.inference.prompt import GenerationSettings
from seed_multimodal.language.answer import AnswerReader
from seed_multimodal.language.text_tokenizer import TextTokenizer


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
        if not self._settings.stop:
            return False
        text = self._tokenizer.decode([*self._initial_ids, *ids])
        if not any(stop in text for stop in self._settings.stop):  # in most steps
            return False
        settings = self._settings
        reader = AnswerReader(self._tokenizer, settings.stop, stop_after=settings.stop_after)
        return reader.read_all([*self._initial_ids, *ids]).found_stop
