"""`BaseEngine`: what callers use of an engine, whatever computes the tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from seed_multimodal.errors import ConfigError, GenerationError
from seed_multimodal.inference.prompt import GenerationSettings, Prompt
from seed_multimodal.inference.request import Request
from seed_multimodal.language.text_tokenizer import TextTokenizer


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation after its prompt.

    log_probs: natural logarithm of each token's probability, given all tokens before it.
    is_greedy: whether greedy decoding would generate the continuation.
    """

    log_probs: Sequence[float]
    is_greedy: bool

    @property
    def total(self) -> float:
        """The log-likelihood."""
        return sum(self.log_probs)

    @property
    def mean(self) -> float:
        """The log-likelihood of a token: long continuations are compared with short ones."""
        return self.total / len(self.log_probs)


@dataclass(frozen=True)
class SampledAnswer:
    """An answer for training by rewards.

    ids: the generated tokens, without those that the prompt holds.
    log_probs: natural logarithm of each token's probability in the distribution from which it was
    chosen: after guidance, image constraints, penalties, temperature, top-k and top-p; of greedy
    answers the same at temperature 1.
    """

    ids: Sequence[int]
    log_probs: Sequence[float]


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
    def n_waiting(self) -> int:
        """Requests that wait for rows."""

    @abstractmethod
    def _put(self, request: Request) -> None:
        """Start a request, now or as soon as rows are free."""

    def submit(
        self,
        prompt: Prompt,
        settings: GenerationSettings,
        previews: Sequence[int] = (),
    ) -> Request:
        """Start an answer; `should_stop` of its settings raises `Stopped` in its iteration.

        previews: see `AnswerReader`.
        Raises GenerationError: an empty or too long prompt, or no space for a forced image;
        ConfigError: beams, which this engine does not have, or with guidance.
        """
        request = self._new_request(prompt, settings, previews=previews)
        self._put(request)
        return request

    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings | Sequence[GenerationSettings],
    ) -> list[list[int]]:
        """The ids of each answer, with `prompt.answered` and a forced `<img>` first.

        settings: of all prompts, or of each. `num_return_sequences` answers for each prompt: of one
        beam search, or with a seed each. Raises as `submit` and `Request`.
        """
        answers: list[list[int]] = []
        for request in self.run(prompts, settings):
            answers += request.answers
        return answers

    def sample(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings | Sequence[GenerationSettings],
    ) -> list[SampledAnswer]:
        """Answers as by `generate`, with the log-probabilities of their tokens.

        Raises as `generate`; ConfigError: beams, or an engine in another program.
        """
        requests = self.run(prompts, settings, records=True)
        return [SampledAnswer(request.ids, request.log_probs) for request in requests]

    def run(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings | Sequence[GenerationSettings],
        **options: Any,
    ) -> Sequence[Request]:
        """The finished requests of `generate`; the `reader` of each has read its (best) answer.

        options: keywords of `Request`.
        """
        # All are made before the first one runs: one that does not fit fails all.
        if isinstance(settings, GenerationSettings):
            settings = [settings] * len(prompts)
        requests: list[Request] = []
        for prompt, prompt_settings in zip(prompts, settings, strict=True):
            seed = prompt_settings.seed
            is_one_search = prompt_settings.num_beams > 1
            for copy in range(1 if is_one_search else prompt_settings.num_return_sequences):
                copy_seed = None if seed is None else (seed + copy) % 2**63
                copy_settings = replace(prompt_settings, seed=copy_seed)
                requests.append(self._new_request(prompt, copy_settings, **options))
        return self._finish(requests)

    def _finish(self, requests: Sequence[Request]) -> Sequence[Request]:
        """Run requests to their ends; whatever ends this call early cancels the rest."""
        try:
            for request in requests:
                self._put(request)
            for request in requests:
                ids = list(request)
                request.answers = request.answers or [[*request.initial_ids, *ids]]
                request.reader.close()
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
        """A request that fits the context and the cache.

        options: keywords of `Request`. Raises the errors of `submit`.
        """
        if settings.num_beams > 1 and not (self.has_beams and settings.guidance == 1):
            raise ConfigError("Beams need the engine torch, and no guidance: leave num_beams at 1.")
        if options.get("records") and not (self.has_scores and settings.num_beams == 1):
            raise ConfigError(
                "Log-probabilities need the engine torch or llama.cpp, without beams."
            )
        request = Request(
            prompt,
            settings,
            tokenizer=self.tokenizer,
            budget=self._token_budget(prompt, settings),
            **options,
        )
        if request.n_rows > self.n_rows:
            raise GenerationError(
                f"The request needs {request.n_rows} rows of the KV cache (beams, and two with "
                f"guidance), but it has {self.n_rows}: use fewer beams, or give more memory by "
                "--kv-cache or rows by --max_running."
            )
        return request

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
