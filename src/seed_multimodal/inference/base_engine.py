"""What callers use of an engine, whatever computes the tokens: `BaseEngine`, and the running
`Request`."""

from __future__ import annotations

import contextlib
import copy
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
    ends_at_stop,
    random_seed,
)
from seed_multimodal.language.answer import AnswerReader, Event
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import ImageGrammar

NO_SCORES = torch.zeros(0, dtype=torch.float32, device="cpu")
# What the engine hands to the caller: a token, an error, or None (the end).
StreamItem = int | BaseException | None


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


@dataclass(frozen=True)
class Request:
    """What is asked of an engine.

    previews: see `AnswerReader`.
    records: whether log-probabilities of the tokens are wanted.
    forced_ids: the tokens to choose, whatever their scores; none: all are free.
    """

    prompt: Prompt
    settings: GenerationSettings
    previews: Sequence[int] = ()
    records: bool = False
    forced_ids: Sequence[int] = ()


@dataclass(eq=False)
class Row:
    """A row of the KV cache, and what it holds.

    sequence: what runs in it; None: the row is idle.
    prompt_input: the backend's form of the prompt (embeddings, or ids), until it is read.
    keys: of the prompt, of an idle row those of all its tokens (see `Prompt.prefix_keys`).
    position_ids: of the prompt that runs in it.
    n_cached: tokens in the cache; between two steps all but the last generated one.
    scores, state: of the next token, `[V]` and `[D]`.
    weights: with which the tokens were computed (see `Backend.weights`).
    """

    index: int
    sequence: GeneratedSequence | None = None
    prompt_input: PromptInput | None = None
    keys: np.ndarray = field(default_factory=lambda: NO_KEYS)
    position_ids: Tensor | None = None
    n_cached: int = 0
    scores: Tensor = NO_SCORES
    state: Tensor | None = None
    weights: object = None
    freed_at: float = 0.0


class GeneratedSequence:
    """The answer to a request while it is generated, and when it is complete.

    Iterate over its tokens, once; leaving the iteration cancels the request, and the request's
    error is raised in it. `ended` is set by either thread: by the engine's when the answer is
    complete or failed, by the caller's when it cancels. The engine frees the rows.

    prompts: `prompt` with a forced `<img>`; with guidance, the unconditional one behind it.
    initial_ids: ids of the answer that the prompt holds (`Prompt.answered`, a forced `<img>`).
    n_rows: of the cache, that it needs.
    vocabulary: with the number of codes of this answer's image.
    budget: new tokens at most; images must fit into them.
    ids: the generated tokens. grammar: where they stand.
    states: last hidden states (after the final norm) of SEED-X's model, see `states_at`.
    answers: complete ids, with `initial_ids`, when all are finished; with beams the best ones, of
    which the iteration gives the first.
    reader: parses the answer for those who read `events`, and what `BaseEngine.run` returns.
    finish_reason: "stop" (an end token or a stop), "length" (the budget); else "cancelled".
    log_probs: natural logarithm of each chosen token's probability, of a completion server with
    `Request.records`; `is_greedy`: each one was the likeliest.
    rows: of the cache, one for each prompt; set by the engine.
    seed, generator: for sampling; it samples what transformers' `generate` samples after
    `torch.manual_seed`. sampling_key: equal for sequences whose tokens are chosen together.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: TextTokenizer,
        capacity: int,
        device: torch.device,
        original_constraints: bool = False,
    ) -> None:
        # 1. What is asked.
        prompt = request.prompt
        settings = request.settings
        vocabulary = tokenizer.vocabulary
        if prompt.n_codes is not None:
            vocabulary = vocabulary.of_length(prompt.n_codes)
        self.vocabulary = vocabulary
        forced = [vocabulary.boi_id] if settings.images == "forced" else []
        self.request = request
        self.prompt = prompt
        self.settings = settings
        ids = [*prompt.ids, *forced]
        self.prompts = [Prompt(ids, prompt.images, position_ids=prompt.position_ids)]
        if settings.guidance != 1:
            self.prompts.append(Prompt(prompt.negative or [vocabulary.boi_id]))
        self.initial_ids = [*prompt.answered, *forced]
        end_ids = settings.stop_token_ids
        self.end_ids = list(tokenizer.eos_token_ids if end_ids is None else end_ids)
        self.n_rows = max(len(self.prompts), settings.num_beams)
        if prompt.position_ids is not None:  # which end with the answer
            capacity = min(capacity, prompt.position_ids.shape[1])
        self.budget = min(settings.max_new_tokens, capacity - len(ids))

        # 2. The answer.
        image_budget = 0 if settings.images == "never" else self.budget
        end_id = self.end_ids[0] if self.end_ids else None
        self._grammar_start = (
            vocabulary,
            image_budget,
            end_id,
            original_constraints,
            self.initial_ids,
        )
        self.grammar = ImageGrammar(*self._grammar_start)
        self.ids: list[int] = []
        self.states: list[Tensor] | None = [] if vocabulary.fixed_image_order else None
        self.log_probs: list[float] = []
        self.is_greedy = True
        self.finish_reason = "cancelled"
        self.answers: list[list[int]] = []
        self.ended = False
        self.rows: list[Row] = []
        n_initial = len(self.initial_ids)
        self.reader = AnswerReader(
            tokenizer,
            settings.stop,
            request.previews,
            settings.stop_after,
            n_initial,
            vocabulary,
            settings.answer_after,
        )
        self._tokenizer = tokenizer
        self._stream: queue.SimpleQueue[StreamItem] = queue.SimpleQueue()

        # 3. How its tokens are chosen.
        self.seed: int | None = None
        self.generator: torch.Generator | None = None
        if settings.samples:
            self.seed = random_seed() if settings.seed is None else settings.seed
            self.generator = torch.Generator(device).manual_seed(self.seed)
        self.sampling_key = (
            settings.constrain,
            settings.guidance,
            settings.repetition_penalty,
            bool(request.forced_ids),
            settings.samples and (settings.temperature, settings.top_k, settings.top_p),
        )

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

    @property
    def search_key(self) -> object:
        """Equal for sequences that one beam search can answer."""
        return replace(self.settings, seed=self.seed), self.budget, self.initial_ids

    def prefix(self, length: int) -> GeneratedSequence:
        """The sequence as it was with so many tokens."""
        prefix = copy.copy(self)
        prefix.ids = self.ids[:length]
        prefix.grammar = ImageGrammar(*self._grammar_start)
        for token in prefix.ids:
            prefix.grammar.feed(token)
        return prefix

    def append(
        self,
        token: int,
        log_prob: float = 0.0,
        is_likeliest: bool = True,
        state: Tensor | None = None,
    ) -> None:
        """Add a token to the answer, hand it to the caller, and end where it is complete.

        log_prob: of the token, where it is known. state: from which it was chosen.
        """
        if self.ended:
            return
        self.ids.append(token)
        self.grammar.feed(token)
        self.log_probs.append(log_prob)
        self.is_greedy &= is_likeliest
        if self.states is not None and state is not None:
            self.states.append(state.clone())
        self._stream.put(token)
        if token in self.end_ids or (self.settings.stop and self._ends_at_stop()):
            self.end("stop")
        elif len(self.ids) == self.budget:
            self.end("length")

    def _ends_at_stop(self) -> bool:
        answer = [*self.initial_ids, *self.ids]
        return ends_at_stop(self._tokenizer, self.settings, answer, len(self.initial_ids))

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
                yield item
        finally:
            self.end("cancelled")

    def events(self) -> Iterator[Event]:
        """The events of the answer (see `language.answer`) in place of its tokens."""
        for token in self.initial_ids:
            yield from self.reader.read(token)
        with contextlib.closing(iter(self)) as tokens:
            for token in tokens:
                yield from self.reader.read(token)
        yield from self.reader.close()


class BaseEngine(ABC):
    """What callers use: `submit` and `generate`, from any thread.

    context: positions of the model.
    capacity: tokens of a sequence that fit the cache.
    n_rows: sequences at once.
    """

    device = torch.device("cpu")  # of the language model
    has_beams = False
    has_axes = False  # whether it computes with `Prompt.position_ids`
    original_constraints = False  # see `ImageGrammar`

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
    def _put(self, sequence: GeneratedSequence) -> None:
        """Generate a sequence, now or as soon as rows are free."""

    def submit(
        self, prompt: Prompt, settings: GenerationSettings, previews: Sequence[int] = ()
    ) -> GeneratedSequence:
        """Start an answer; `should_stop` of its settings raises `Stopped` in its iteration.

        previews: see `AnswerReader`.
        Raises GenerationError: an empty or too long prompt, or no space for a forced image;
        ConfigError: beams, which this engine does not have, or with guidance.
        """
        sequence = self._begun(Request(prompt, settings, previews))
        self._put(sequence)
        return sequence

    def generate(
        self, prompts: Sequence[Prompt], settings: GenerationSettings | Sequence[GenerationSettings]
    ) -> list[list[int]]:
        """The ids of each answer, with `prompt.answered` and a forced `<img>` first.

        settings: of all prompts, or of each. `num_return_sequences` answers for each prompt: of one
        beam search, or with a seed each. Raises as `submit`.
        """
        answers: list[list[int]] = []
        for sequence in self.run(prompts, settings, reads=False):
            answers += sequence.answers
        return answers

    def sample(
        self, prompts: Sequence[Prompt], settings: GenerationSettings | Sequence[GenerationSettings]
    ) -> list[SampledAnswer]:
        """Answers as by `generate`, with the log-probabilities of their tokens.

        Raises as `generate`; ConfigError: beams, or a server that returns others.
        """
        sequences = self.run(prompts, settings, records=True, reads=False)
        return [SampledAnswer(sequence.ids, sequence.log_probs) for sequence in sequences]

    def run(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationSettings | Sequence[GenerationSettings],
        *,
        records: bool = False,
        forced_ids: Sequence[Sequence[int]] = (),
        reads: bool = True,
    ) -> Sequence[GeneratedSequence]:
        """The finished sequences of `generate`.

        records, forced_ids: see `Request`; ids of each prompt.
        reads: the `reader` of each reads its (best) answer.
        """
        # 1. All are made before the first one runs: one that does not fit fails all.
        if isinstance(settings, GenerationSettings):
            settings = [settings] * len(prompts)
        sequences: list[GeneratedSequence] = []
        forced_ids = forced_ids or [()] * len(prompts)
        for prompt, first_settings, ids in zip(prompts, settings, forced_ids, strict=True):
            is_one_search = first_settings.num_beams > 1
            for index in range(1 if is_one_search else first_settings.num_return_sequences):
                seed = first_settings.seed
                if seed is not None:
                    seed = (seed + index) % 2**63
                copy_settings = replace(first_settings, seed=seed)
                sequences.append(self._begun(Request(prompt, copy_settings, (), records, ids)))

        # 2. Whatever ends this call early cancels the rest.
        try:
            for sequence in sequences:
                self._put(sequence)
            for sequence in sequences:
                for _ in sequence:
                    pass  # they are in `sequence.ids`
                answer = [*sequence.initial_ids, *sequence.ids]
                if not sequence.answers:  # of beams
                    sequence.answers = [answer]
                if reads:
                    for token in answer:
                        sequence.reader.read(token)
                    sequence.reader.close()
        finally:
            for sequence in sequences:
                sequence.end("cancelled")
        return sequences

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

    def _begun(self, request: Request) -> GeneratedSequence:
        """The sequence of a request, whose rows and prompt fit the cache and the context."""
        sequence = GeneratedSequence(
            request, self.tokenizer, self.capacity, self.device, self.original_constraints
        )

        # 1. What this engine can do.
        settings = request.settings
        if settings.num_beams > 1 and not (self.has_beams and settings.guidance == 1):
            raise ConfigError("Beams need the engine torch, and no guidance: leave num_beams at 1.")
        if request.records and settings.num_beams > 1:
            raise ConfigError("Log-probabilities are of answers without beams.")
        if request.prompt.position_ids is not None and not (self.has_axes and sequence.n_rows == 1):
            raise ConfigError(
                "Positions with axes need the engine torch, no beams and no guidance."
            )

        # 2. The prompt, with a forced `<img>`, leaves a position for a token.
        length = len(sequence.prompts[0])
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
        budget = sequence.budget
        needed = sequence.vocabulary.min_codes + 1
        if settings.images == "forced" and settings.constrain and budget < needed:
            raise GenerationError(
                f"An image needs {needed} new tokens, but only {budget} are left (max_new_tokens "
                f"{settings.max_new_tokens}, context {self.capacity})."
            )
        if sequence.n_rows > self.n_rows:
            raise GenerationError(
                f"The request needs {sequence.n_rows} rows of the KV cache (beams, and two with "
                f"guidance), but it has {self.n_rows}: use fewer beams, or give more memory by "
                "--kv-cache or rows by --max_running."
            )
        return sequence
