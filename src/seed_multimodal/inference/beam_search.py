"""Beam search of one request; scores and ends are those of transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from seed_multimodal.inference.prompt import GenerationSettings
from seed_multimodal.inference.stopping import BeamStops


class Beam(Protocol):
    """What the search reads of a running beam."""

    ids: list[int]
    hidden_states: dict[int, Tensor]


NEVER = -1e9  # the score of a beam that does not count


@dataclass
class Hypothesis:
    """A finished answer, or an empty place for one."""

    score: Tensor  # float32 [], with the length penalty
    ids: list[int] = field(default_factory=list)
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    finished: bool = False
    complete: bool = False  # by an end token or a stop, not by the budget


@dataclass(frozen=True)
class Continuation:
    """A beam of the next step: the beam that it continues, and its next token."""

    parent: int
    token: int


class BeamSearch:
    """The scores of the running beams, and the best finished answers so far.

    generator: samples the continuations; None: the most probable ones.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        end_ids: Sequence[int],
        stops: BeamStops,
        budget: int,
        generator: torch.Generator | None = None,
    ) -> None:
        n_beams = settings.num_beams
        self.n_beams = n_beams
        self.length_penalty = settings.length_penalty
        self.early_stopping = settings.early_stopping
        self.end_ids = frozenset(end_ids)
        self.stops = stops
        self.budget = budget
        self.generator = generator
        self.done = False
        # All beams start as one: only the first counts in the first step.
        self.scores = torch.full((n_beams,), NEVER)
        self.scores[0] = 0.0
        self.hypotheses = [Hypothesis(torch.tensor(NEVER)) for _ in range(n_beams)]
        self._can_improve = True

    def step(self, log_probs: Tensor, beams: Sequence[Beam]) -> list[Continuation]:
        """Log probabilities `[len(beams), V]` of the next tokens → the next beams, best first.

        In the first step there is a single beam, of which all are copies. `done` is set when the
        search has ended.
        """
        length = len(beams[0].ids) + 1  # of the continuations
        vocab_size = log_probs.shape[1]

        # 1. The best continuations of all beams together: so many that enough remain if some of
        #    them are finished.
        n_candidates = max(2, 1 + len(self.end_ids)) * self.n_beams
        totals = log_probs.expand(self.n_beams, -1) + self.scores[:, None].to(log_probs.device)
        candidate_scores, candidate_indices = self._candidates(totals.flatten(), n_candidates)
        candidates = [
            Continuation(min(index // vocab_size, len(beams) - 1), index % vocab_size)
            for index in candidate_indices
        ]

        # 2. Those with an end token, or without tokens left, are finished.
        at_limit = length >= self.budget
        ended = [self._ends(beams[candidate.parent], candidate.token) for candidate in candidates]
        finished = torch.tensor([at_limit or is_end for is_end in ended])

        # 3. The best others are the beams of the next step.
        running_scores = candidate_scores + finished.float() * NEVER
        self.scores, order = running_scores.topk(self.n_beams)
        running = [candidates[index] for index in order.tolist()]

        # 4. Finished ones among the best `n_beams` candidates compete with the answers so far.
        self._collect(candidates, candidate_scores, finished, ended, beams, length)

        # 5. Stop if no running beam can become better than the worst finished answer, by
        #    transformers' estimate.
        best_running = self.scores[0] / length**self.length_penalty
        if not best_running > self._score_to_beat():
            self._can_improve = False
        self.done = self._is_closed or bool(finished.all())
        return running

    @property
    def _all_finished(self) -> bool:
        return all(hypothesis.finished for hypothesis in self.hypotheses)

    @property
    def _is_closed(self) -> bool:
        """Whether no answer is added any more."""
        return not self._can_improve or (self.early_stopping and self._all_finished)

    def _score_to_beat(self) -> float:
        """The score of the worst finished answer; any other beats a place that is empty."""
        if not self._all_finished:
            return NEVER
        return min(float(hypothesis.score) for hypothesis in self.hypotheses)

    def _ends(self, beam: Beam, token: int) -> bool:
        """Whether a beam is complete with this token."""
        return token in self.end_ids or self.stops.ends([*beam.ids, token])

    def _candidates(self, totals: Tensor, count: int) -> tuple[Tensor, list[int]]:
        """The best, or sampled, of `[beams * V]` accumulated scores: on the CPU, best first."""
        if self.generator is None:
            scores, indices = totals.topk(count)
        else:
            sampled = torch.multinomial(totals.softmax(dim=-1), count, generator=self.generator)
            scores, order = totals[sampled].sort(descending=True)
            indices = sampled[order]
        return scores.cpu(), indices.tolist()

    def _collect(
        self,
        candidates: Sequence[Continuation],
        scores: Tensor,
        finished: Tensor,
        ended: Sequence[bool],
        beams: Sequence[Beam],
        length: int,
    ) -> None:
        """Keep the best `n_beams` of the finished answers and the newly finished candidates."""
        if self._is_closed:
            return
        new: list[Hypothesis] = []
        for index, candidate in enumerate(candidates[: self.n_beams]):
            if not finished[index]:
                continue
            parent = beams[candidate.parent]
            new.append(
                Hypothesis(
                    scores[index] / length**self.length_penalty,
                    [*parent.ids, candidate.token],
                    dict(parent.hidden_states),
                    finished=True,
                    complete=ended[index],
                )
            )
        best_first = sorted(
            [*self.hypotheses, *new], key=lambda hypothesis: float(hypothesis.score), reverse=True
        )
        self.hypotheses = best_first[: self.n_beams]
