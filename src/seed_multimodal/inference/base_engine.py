"""What callers use of an engine, whatever computes the tokens: `BaseEngine`, and the running
`Request`."""

from __future__ import annotations

import contextlib
import queue
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.errors import ConfigError, GenerationError
from seed_multimodal.inference.prompt import (
    NO_KEYS,
    GenerationSettings,
    Prompt,
    PromptInput,
    Stopped,
    random_seed,
)
from seed_multimodal.inference.sampling import (
    ImageConstraints,
    LogitsProcessor,
    build_processors,
    build_warpers,
)
from seed_multimodal.language.answer import AnswerReader, Event
from seed_multimodal.language.text_tokenizer import TextTokenizer

NO_SCORES = torch.zeros(0, dtype=torch.float32, device="cpu")
# What the engine hands to the caller: a token with its events, an error, or None (the end).
StreamItem = tuple[int, list[Event]] | BaseException | None


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


@dataclass(eq=False)
class Row:
    """A row of the KV cache, and what it holds.

    request: what runs in it; None: the row is idle.
    prompt_input: the backend's form of the prompt (embeddings, or ids), until it is read.
    keys: of the prompt, of an idle row those of all its tokens (see `Prompt.prefix_keys`).
    n_cached: tokens in the cache; between two steps all but the last generated one.
    scores, state: of the next token, `[1, V]` and `[D]`.
    weights: with which the tokens were computed (see `Backend.weights`).
    """

    index: int
    request: Request | None = None
    prompt_input: PromptInput | None = None
    keys: np.ndarray = field(default_factory=lambda: NO_KEYS)
    n_cached: int = 0
    scores: Tensor = NO_SCORES
    state: Tensor | None = None
    weights: object = None
    freed_at: float = 0.0

    def common_prefix(self, prompt_keys: np.ndarray) -> int:
        """Tokens at the beginning of a prompt that the row holds; the last is always computed."""
        length = min(len(self.keys), self.n_cached, len(prompt_keys) - 1)
        if length <= 0:
            return 0
        differs = self.keys[:length] != prompt_keys[:length]
        first_difference = int(differs.argmax())
        return first_difference if differs[first_difference] else length


class Request:
    """A running request: iterate over its tokens, once; leaving the iteration cancels the request.

    The iteration raises the request's error. `ended` is set by either thread: by the engine's when
    the answer is complete or failed, by the caller's when it cancels. The engine frees the rows.

    prompts: `prompt` with a forced `<img>`; with guidance, the unconditional one behind it.
    initial_ids: ids of the answer that the prompt holds (`Prompt.answered`, a forced `<img>`).
    budget: new tokens at most; `image_budget`: into which images must fit.
    ids: the generated tokens.
    states: last hidden states (after the final norm) of SEED-X's model, see `states_at`.
    answers: complete ids, with `initial_ids`, when all are finished; with beams the best ones, of
    which the iteration gives the first.
    reader: parses the answer while it is generated, and finds its stops. `previews`: see there.
    finish_reason: "stop" (an end token or a stop), "length" (the budget); else "cancelled".
    forced_ids: the tokens to choose, whatever their scores.
    log_probs: natural logarithm of each chosen token's probability, with `records` or forced ids;
    `is_greedy`: each one was the likeliest.
    n_rows: rows of the cache that the request needs. rows: those that it has, one for each prompt;
    set by the engine.
    processors, warpers, generator: for the choice of tokens.

    Raises the errors of `BaseEngine.submit`.
    """

    def __init__(
        self,
        engine: BaseEngine,
        prompt: Prompt,
        settings: GenerationSettings,
        *,
        previews: Sequence[int] = (),
        records: bool = False,
        forced_ids: Sequence[int] | None = None,
    ) -> None:
        # 1. What is asked.
        tokenizer = engine.tokenizer
        vocabulary = tokenizer.vocabulary
        forced = [vocabulary.boi_id] if settings.images == "forced" else []
        self.prompt = prompt
        self.settings = settings
        self.prompts = [Prompt([*prompt.ids, *forced], prompt.images)]
        if settings.guidance != 1:
            self.prompts.append(Prompt(prompt.negative or [vocabulary.boi_id]))
        self.initial_ids = [*prompt.answered, *forced]
        end_ids = settings.stop_token_ids
        self.end_ids = list(tokenizer.eos_token_ids if end_ids is None else end_ids)
        self.records = records or forced_ids is not None
        self.forced_ids = forced_ids
        self.n_rows = max(len(self.prompts), settings.num_beams)
        self.budget = engine.token_budget(self)
        self.image_budget = 0 if settings.images == "never" else self.budget

        # 2. The answer.
        self.ids: list[int] = []
        self.states: list[Tensor] | None = [] if vocabulary.fixed_image_order else None
        self.log_probs: list[float] = []
        self.is_greedy = True
        self.finish_reason = "cancelled"
        self.answers: list[list[int]] = []
        self.ended = False
        self.reader = AnswerReader(tokenizer, settings.stop, previews, settings.stop_after)
        self._new_events: list[Event] = []  # of the last token that the caller's iteration gave
        for token in self.initial_ids:
            self._new_events += self.reader.read(token)
        self._stream: queue.SimpleQueue[StreamItem] = queue.SimpleQueue()

        # 3. How its tokens are chosen. It samples what transformers' `generate` samples after
        #    `torch.manual_seed`.
        self.rows: list[Row] = []
        self.processors = build_processors(settings, self.end_ids, engine.device)
        if settings.constrain:
            opened = self.initial_ids[-1:] == [vocabulary.boi_id]
            constraints = ImageConstraints(
                vocabulary,
                opened,
                self.image_budget,
                engine.original_constraints,
                end_id=self.end_ids[0] if self.end_ids else None,
            )
            self.processors.insert(0, constraints)
        self.seed: int | None = None
        self.warpers: list[LogitsProcessor] = []
        self.generator: torch.Generator | None = None
        if settings.samples:
            self.seed = random_seed() if settings.seed is None else settings.seed
            self.warpers = build_warpers(settings)
            self.generator = torch.Generator(engine.device).manual_seed(self.seed)

    def states_at(self, positions: Sequence[int]) -> Tensor:
        """States `[len(positions), D]` at these tokens of the answer, also while it is generated.

        The state at a token is known when the next one is chosen. Raises GenerationError: nothing
        follows a token.
        """
        first = len(self.initial_ids) - 1  # the first state is the one at the prompt's last token
        if self.states is None or positions[-1] - first >= len(self.states):
            raise GenerationError(
                "The answer ends inside an image, so there is no state at its last word."
            )
        return torch.stack([self.states[position - first] for position in positions])

    def processed(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[1, V]` of the token after the answer's `ids` `[1, n]` → those from which it is
        chosen."""
        for process in (*self.processors, *self.warpers):
            scores = process(ids, scores)
        return scores

    def searches_as(self, other: Request) -> bool:
        """Whether one beam search can answer both."""
        names = ("budget", "seed", "initial_ids")
        is_equal = all(getattr(self, name) == getattr(other, name) for name in names)
        return is_equal and replace(self.settings, seed=None) == replace(other.settings, seed=None)

    def append(self, token: int, log_prob: float | None = None) -> None:
        """Add a token to the answer, hand it to the caller, and end where it is complete.

        log_prob: of the token, with `records`.
        """
        if self.ended:
            return
        self.ids.append(token)
        if self.records:
            assert log_prob is not None
            self.log_probs.append(log_prob)
        self._stream.put((token, self.reader.read(token)))
        if token in self.end_ids or self.reader.found_stop:
            self.end("stop")
        elif len(self.ids) == self.budget:
            self.end("length")

    def end(self, result: str | BaseException) -> None:
        """End the answer by its `finish_reason`, or an error that the caller's iteration raises;
        the engine soon frees the rows."""
        if self.ended:
            return
        self.ended = True
        if isinstance(result, str):
            self.finish_reason = result
            self._stream.put(None)
        else:
            self._stream.put(result)

    def stop_if_asked(self) -> None:
        """End the request if its caller's `should_stop` is true, or raises."""
        should_stop = self.settings.should_stop
        if self.ended or should_stop is None:
            return
        try:
            if should_stop():
                self.end(Stopped())
        except BaseException as error:  # noqa: BLE001 its error must not end the engine's thread
            self.end(error)

    def __iter__(self) -> Generator[int]:
        try:
            while (item := self._stream.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                token, self._new_events = item
                yield token
        finally:
            self.end("cancelled")

    def events(self) -> Iterator[Event]:
        """The events of the answer (see `language.answer`) in place of its tokens."""
        yield from self._new_events
        with contextlib.closing(iter(self)) as tokens:
            for _ in tokens:
                yield from self._new_events
        yield from self.reader.close()


class BaseEngine(ABC):
    """What callers use: `submit` and `generate`, from any thread.

    context: positions of the model.
    capacity: tokens of a sequence that fit the cache.
    n_rows: sequences at once.
    """

    device = torch.device("cpu")  # of the language model
    has_beams = False
    original_constraints = False  # see `ImageConstraints`

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
        self, prompt: Prompt, settings: GenerationSettings, previews: Sequence[int] = ()
    ) -> Request:
        """Start an answer; `should_stop` of its settings raises `Stopped` in its iteration.

        previews: see `AnswerReader`.
        Raises GenerationError: an empty or too long prompt, or no space for a forced image;
        ConfigError: beams, which this engine does not have, or with guidance.
        """
        request = Request(self, prompt, settings, previews=previews)
        self._put(request)
        return request

    def generate(
        self, prompts: Sequence[Prompt], settings: GenerationSettings | Sequence[GenerationSettings]
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
        self, prompts: Sequence[Prompt], settings: GenerationSettings | Sequence[GenerationSettings]
    ) -> list[SampledAnswer]:
        """Answers as by `generate`, with the log-probabilities of their tokens.

        Raises as `generate`; ConfigError: beams, or a server that returns others.
        """
        requests = self.run(prompts, settings, records=True)
        return [SampledAnswer(request.ids, request.log_probs) for request in requests]

    def run(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings | Sequence[GenerationSettings],
        *,
        records: bool = False,
        forced_ids: Sequence[Sequence[int]] | None = None,
    ) -> Sequence[Request]:
        """The finished requests of `generate`; the `reader` of each has read its (best) answer.

        records, forced_ids: see `Request`; ids of each prompt.
        """
        # All are made before the first one runs: one that does not fit fails all.
        if isinstance(settings, GenerationSettings):
            settings = [settings] * len(prompts)
        requests: list[Request] = []
        forced: Sequence[Sequence[int] | None] = forced_ids or [None] * len(prompts)
        for prompt, prompt_settings, ids in zip(prompts, settings, forced, strict=True):
            seed = prompt_settings.seed
            is_one_search = prompt_settings.num_beams > 1
            for copy in range(1 if is_one_search else prompt_settings.num_return_sequences):
                if copy and seed is not None:
                    prompt_settings = replace(prompt_settings, seed=(seed + copy) % 2**63)
                requests.append(
                    Request(self, prompt, prompt_settings, records=records, forced_ids=ids)
                )

        # Whatever ends this call early cancels the rest.
        try:
            for request in requests:
                self._put(request)
            for request in requests:
                for _ in request:
                    pass  # they are in `request.ids`
                if not request.answers:  # of beams
                    request.answers = [[*request.initial_ids, *request.ids]]
                request.reader.close()
        finally:
            for request in requests:
                request.end("cancelled")
        return requests

    def forget(self) -> None:  # noqa: B027 (an engine without a cache)
        """Compute all later prompts anew, after a change of the weights that is not noticed, such
        as other layers between an image's features and its embeddings."""

    def likelihoods(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Likelihood]]:
        """The likelihood of each continuation (one token or more) of each prompt.

        Raises as `generate`; ConfigError: prompts with features by a server.
        """
        raise ConfigError("This engine computes no likelihoods.")

    def token_budget(self, request: Request) -> int:
        """New tokens for a request, whose rows and prompt fit the cache and the context."""
        # 1. What this engine can do.
        settings = request.settings
        if settings.num_beams > 1 and not (self.has_beams and settings.guidance == 1):
            raise ConfigError("Beams need the engine torch, and no guidance: leave num_beams at 1.")
        if request.records and settings.num_beams > 1:
            raise ConfigError("Log-probabilities are of answers without beams.")

        # 2. The prompt, with a forced `<img>`, leaves a position for a token.
        length = len(request.prompts[0])
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

        # 3. A forced image fits, with its codes and `</img>`.
        budget = min(settings.max_new_tokens, self.capacity - length)
        needed = self.vocabulary.min_codes + 1
        if settings.images == "forced" and settings.constrain and budget < needed:
            raise GenerationError(
                f"An image needs {needed} new tokens, but only {budget} are left (max_new_tokens "
                f"{settings.max_new_tokens}, context {self.capacity})."
            )
        if request.n_rows > self.n_rows:
            raise GenerationError(
                f"The request needs {request.n_rows} rows of the KV cache (beams, and two with "
                f"guidance), but it has {self.n_rows}: use fewer beams, or give more memory by "
                "--kv-cache or rows by --max_running."
            )
        return budget
