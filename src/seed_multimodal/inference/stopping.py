"""Ends of answers by texts (`GenerationSettings.stop`), such as the opening of the next turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seed_multimodal.inference.prompt import GenerationSettings
from seed_multimodal.language.answer import AnswerReader
from seed_multimodal.language.text_tokenizer import TextTokenizer


class StopDetector:
    """Reads an answer token by token, and tells when one of the settings' stops is complete."""

    def __init__(
        self, tokenizer: TextTokenizer, settings: GenerationSettings, ids: Sequence[int] = ()
    ) -> None:
        self._reader = AnswerReader(tokenizer, settings.stop, after=settings.stop_after)
        for token in ids:
            self._reader.read(token)

    def completes_stop(self, token: int) -> bool:
        """Add a token: whether the answer ends with it."""
        self._reader.read(token)
        return self._reader.finished


class StopTexts:
    """The same for rows whose tokens are not known in order (beams), as a stopping criterion of
    transformers' `generate`; `ends` reads a whole answer."""

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
        detector = StopDetector(self._tokenizer, self._settings, self._initial_ids)
        return any(detector.completes_stop(token) for token in ids)
