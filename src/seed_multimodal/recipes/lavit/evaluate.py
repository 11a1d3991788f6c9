"""Evaluation of LaVIT as published: its questions, and its rule for answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.vqa import DIGITS, UNANSWERABLE, Questions, vqa_answer
from seed_multimodal.models.lavit.pipeline import LavitFamily
from seed_multimodal.models.lavit.processing import Lemmatizer, QuestionProcessor

# LaVIT's rule: prefixes of answers that are removed in this order, each once.
_OPENINGS = ("it is", "this is", "she's", "very", "for", "to", "in", "on", "at", "a", "an", "the")
LEMMATISED = "_lemm"  # suffix of ground-truth files lemmatized by LaVIT's authors
_NO_ANSWERS = ("i don't know", "i do n't know", "i need to know", "")


def lavit_answer(text: str) -> str:
    """LaVIT's rule, on top of `vqa_answer`.

    "no" for "nope", no prefixes like "it is", "unanswerable" for "I don't know".
    """
    answer = vqa_answer(text, {**DIGITS, "nope": "no"})
    if answer in _NO_ANSWERS:
        return UNANSWERABLE
    for prefix in _OPENINGS:
        answer = answer.removeprefix(f"{prefix} ").strip()
    return answer or UNANSWERABLE


class LavitQuestions(Questions):
    """Questions about images."""

    def prepare(self, samples: Sequence[Sample]) -> None:
        self.rule = lavit_answer
        family = self.system.family
        assert isinstance(family, LavitFamily)
        # nano-lavit uses its training prompt, the unchanged question.
        if family.config.found.original:
            self.as_asked = QuestionProcessor()
        # LaVIT's answers are compared with lemmatized references.
        if LEMMATISED not in Path(self.truth or self.file).stem:
            family.lemmatizer = family.lemmatizer or Lemmatizer()
            self.lemma = family.lemmatizer
