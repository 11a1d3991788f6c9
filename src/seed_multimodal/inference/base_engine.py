"""`BaseEngine`: what callers use of an engine, whatever computes the tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
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
        states: dict[int, Tensor] | None = None,
        should_stop: Callable[[], bool] | None = None,
        previews: Sequence[int] = (),
    ) -> Request:
        """Start an answer.

        Raises GenerationError: an empty or too long prompt, or no space for a forced image;
        ConfigError: beams, which this engine does not have, or with guidance.

        states: receives hidden states (see `HiddenStates`).
        should_stop: called before each token, also while the request waits; true raises `Stopped`.
        previews: see `AnswerReader`.
        """
        request = self._new_request(
            prompt, settings, states=states, should_stop=should_stop, previews=previews
        )
        self._enqueue([request])
        return request

    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings | Sequence[GenerationSettings],
        *,
        states: HiddenStates | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[list[int]]:
        """The ids of each answer, with `prompt.answered` and a forced `<img>` first.

        settings: of all prompts, or of each. `num_return_sequences` answers for each prompt: of one
        beam search, or with a seed each. Raises as `submit` and `Request`.
        """
        requests = self._new_requests(prompts, settings, states, should_stop=should_stop)
        answers: list[list[int]] = []
        for request in self._finish(requests):
            answers += [[*request.initial_ids, *ids] for ids in request.answers]
        return answers

    def sample(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings | Sequence[GenerationSettings],
    ) -> list[SampledAnswer]:
        """Answers as by `generate`, with the log-probabilities of their tokens.

        Raises as `generate`; ConfigError: beams, or an engine in another program.
        """
        requests = self._new_requests(prompts, settings, log_probs=True)
        if not self.has_scores or any(request.settings.num_beams > 1 for request in requests):
            raise ConfigError(
                "Log-probabilities need the engine torch or llama.cpp, without beams."
            )
        answers: list[SampledAnswer] = []
        for request in self._finish(requests):
            assert request.chooser is not None
            answers.append(SampledAnswer(request.answers[0], request.chooser.log_probs))
        return answers

    def _new_requests(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings | Sequence[GenerationSettings],
        states: HiddenStates | None = None,
        **options: Any,
    ) -> list[Request]:
        """All requests of a call, before the first one runs: one that does not fit fails all."""
        if isinstance(settings, GenerationSettings):
            settings = [settings] * len(prompts)
        requests: list[Request] = []
        n_answers = 0
        for prompt, prompt_settings in zip(prompts, settings, strict=True):
            n_copies = prompt_settings.num_return_sequences
            seed = prompt_settings.seed
            for copy in range(1 if prompt_settings.num_beams > 1 else n_copies):
                copy_seed = None if seed is None else (seed + copy) % 2**63
                row_states = None if states is None else states[n_answers + copy]
                copy_settings = replace(prompt_settings, seed=copy_seed)
                requests.append(
                    self._new_request(prompt, copy_settings, states=row_states, **options)
                )
            n_answers += n_copies
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
