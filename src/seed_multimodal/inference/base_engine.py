"""`BaseEngine`: what callers use of an engine, whatever computes the tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.errors import ConfigError, GenerationError
from seed_multimodal.inference.likelihood import Likelihood, SampledAnswer
from seed_multimodal.inference.prompt import GenerationSettings, HiddenStates, Prompt
from seed_multimodal.inference.request import Request
from seed_multimodal.language.text_tokenizer import TextTokenizer


class BaseEngine(ABC):
    """What callers use: `submit` and `generate`, from any thread.

    context: positions of the model.
    capacity: tokens of a sequence that fit the cache.
    n_rows: sequences at once.
    """

    device = torch.device("cpu")  # of the language model
    has_beams = False
    has_scores = False

    def __init__(self, tokenizer: TextTokenizer, context: int, capacity: int, n_rows: int) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = tokenizer.vocabulary
        self.context = context
        self.capacity = capacity
        self.n_rows = n_rows

    @property
    @abstractmethod
    def n_running(self) -> int:
        """Requests that have rows."""

    @property
    @abstractmethod
    def n_waiting(self) -> int:
        """Requests that wait for rows."""

    @abstractmethod
    def _enqueue(self, requests: Sequence[Request]) -> None:
        """Start requests, now or as soon as rows are free."""

    def submit(
        self,
        prompt: Prompt,
        settings: GenerationSettings,
        *,
        seed: int | None = None,
        end_ids: Sequence[int] | None = None,
        states: dict[int, Tensor] | None = None,
        should_stop: Callable[[], bool] | None = None,
        previews: Sequence[int] = (),
    ) -> Request:
        """Start an answer.

        Raises GenerationError: an empty or too long prompt, or no space for a forced image;
        ConfigError: beams, which this engine does not have, or with guidance.

        end_ids: tokens that end it; None: `</s>`.
        states: receives hidden states (see `HiddenStates`).
        should_stop: called before each token, also while the request waits; true raises `Stopped`.
        previews: see `AnswerReader`.
        """
        request = self._new_request(
            prompt,
            settings,
            seed=seed,
            end_ids=end_ids,
            states=states,
            should_stop=should_stop,
            previews=previews,
        )
        self._enqueue([request])
        return request

    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings,
        *,
        seeds: Sequence[int] | None = None,
        end_ids: Sequence[int] | None = None,
        states: HiddenStates | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[list[int]]:
        """The ids of each answer, with `prompt.answered` and a forced `<img>` first.

        `settings.num_return_sequences` answers for each prompt: of one beam search, or with a seed
        each. Raises as `submit` and `Request`.
        """
        requests = self._new_requests(
            prompts, settings, seeds, states, end_ids=end_ids, should_stop=should_stop
        )
        answers: list[list[int]] = []
        for request in self._finish(requests):
            answers += [[*request.initial_ids, *ids] for ids in request.answers]
        return answers

    def sample(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings,
        *,
        seeds: Sequence[int] | None = None,
        end_ids: Sequence[int] | None = None,
    ) -> list[SampledAnswer]:
        """Answers as by `generate`, with the log-probabilities of their tokens.

        Raises as `generate`; ConfigError: beams, or an engine in another program.
        """
        if settings.num_beams > 1 or not self.has_scores:
            raise ConfigError(
                "Log-probabilities need the engine torch or llama.cpp, without beams."
            )
        requests = self._new_requests(prompts, settings, seeds, end_ids=end_ids, log_probs=True)
        answers: list[SampledAnswer] = []
        for request in self._finish(requests):
            assert request.chooser is not None
            answers.append(SampledAnswer(request.answers[0], request.chooser.log_probs))
        return answers

    def _new_requests(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings,
        seeds: Sequence[int] | None,
        states: HiddenStates | None = None,
        **options: Any,
    ) -> list[Request]:
        """All requests of a call, before the first one runs: one that does not fit fails all."""
        n_answers = settings.num_return_sequences
        n_requests = 1 if settings.num_beams > 1 else n_answers  # of each prompt
        requests: list[Request] = []
        for index, prompt in enumerate(prompts):
            first_seed = settings.seed if seeds is None else seeds[index]
            for copy in range(n_requests):
                seed = None if first_seed is None else (first_seed + copy) % 2**63
                row_states = None if states is None else states[index * n_answers + copy]
                requests.append(
                    self._new_request(prompt, settings, seed=seed, states=row_states, **options)
                )
        return requests

    def _finish(self, requests: Sequence[Request]) -> Sequence[Request]:
        """Run requests to their ends; whatever ends this call early cancels the rest."""
        self._enqueue(requests)
        try:
            for request in requests:
                ids = list(request)
                request.answers = request.answers or [ids]
        finally:
            for request in requests:
                request.cancel()
        return requests

    def likelihoods(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Likelihood]]:
        """The likelihood of each continuation (one token or more) of each prompt.

        Raises as `generate`; ConfigError: the engine runs in another program.
        """
        raise ConfigError(
            "Likelihoods are computed by the engines torch and llama.cpp, not by a server."
        )

    def _new_request(self, prompt: Prompt, settings: GenerationSettings, **options: Any) -> Request:
        """A request that fits the context and the cache; `options`: of `Request`. Raises as
        `submit`."""
        if settings.num_beams > 1 and not (self.has_beams and settings.guidance == 1):
            raise ConfigError("Beams need the engine torch, and no guidance: leave num_beams at 1.")
        request = Request(
            prompt,
            settings,
            tokenizer=self.tokenizer,
            device=self.device,
            budget=self._token_budget(prompt, settings),
            **options,
        )
        if request.max_rows > self.n_rows:
            raise GenerationError(
                f"The request needs {request.max_rows} rows of the KV cache (beams, and two with "
                f"guidance), but it has {self.n_rows}: use fewer beams, or give more memory by "
                "--kv-cache or rows by --max_running."
            )
        return request

    def _append(self, request: Request, token: int) -> None:
        """Add a token to an answer without beams, deliver it, and end a complete answer."""
        if request.ended:
            return
        sequence = request.sequences[0]
        sequence.append(token, self.vocabulary)
        if sequence.unconditional is not None:
            sequence.unconditional.append(token, self.vocabulary)
        request.deliver(token)

        if token in request.end_ids or request.reader.found_stop:
            request.finish("stop")
        elif len(sequence.ids) == request.budget:
            request.finish("length")

    def _token_budget(self, prompt: Prompt, settings: GenerationSettings) -> int:
        """New tokens that fit; a forced image needs its codes and `</img>`."""
        # 1. The prompt, with a forced `<img>`, leaves a position for a token.
        length = len(prompt) + int(settings.forces_image)
        if length == 0:
            raise GenerationError("The prompt is empty.")
        if length >= self.context:
            raise GenerationError(
                f"The prompt has {length} tokens, but the model's context ends at {self.context}; "
                "make it shorter."
            )
        if length >= self.capacity:
            raise GenerationError(
                f"The prompt has {length} tokens, but {self.capacity} fit into the KV cache; make "
                "it shorter, or give more memory by --kv-cache."
            )

        # 2. A forced image fits.
        budget = min(settings.max_new_tokens, self.capacity - length)
        needed = self.vocabulary.min_codes + 1
        if settings.forces_image and settings.constrain and budget < needed:
            raise GenerationError(
                f"An image needs {needed} new tokens, but only {budget} are left (max_new_tokens "
                f"{settings.max_new_tokens}, context {self.capacity})."
            )
        return budget
