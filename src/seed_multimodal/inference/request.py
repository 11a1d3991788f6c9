"""The running `Request`, and the token sequences that it has in rows of the KV cache."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.inference.prompt import (
    GenerationSettings,
    Prompt,
    PromptInput,
    Stopped,
    random_seed,
)
from seed_multimodal.inference.sampling import LogitsProcessor, TokenChooser
from seed_multimodal.language.answer import AnswerReader, Event
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import ImageVocabulary

# What the engine hands to the caller: a token with its events (None: the caller reads it), an
# error, or None (the end).
StreamItem = tuple[int, list[Event] | None] | BaseException | None


@dataclass(eq=False)
class TokenSequence:
    """Tokens in one row of the KV cache: a prompt, and what was generated after it.

    prompt_input: the backend's form of the prompt (embeddings, or ids).
    n_cached: tokens in the cache; between two steps all but the last generated one.
    scores, state: of the first token, while another prompt of the request is still being read.
    unconditional: of guidance, in a row of its own; it gets the same tokens. No beam or sampling
    of its own (`is_unconditional`): only its scores are used.
    """

    request: Request
    prompt: Prompt
    prompt_keys: np.ndarray
    is_unconditional: bool = False
    prompt_input: PromptInput | None = None
    n_cached: int = 0
    ids: list[int] = field(default_factory=list)
    scores: Tensor | None = None
    state: Tensor | None = None
    in_image: bool = False
    image_tokens: int = 0  # since `<img>`
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    unconditional: TokenSequence | None = None

    @property
    def n_prompt(self) -> int:
        return len(self.prompt_keys)

    @property
    def prompt_is_read(self) -> bool:
        return self.n_cached >= self.n_prompt

    @property
    def tokens_for_images(self) -> int:
        """Tokens left for images that begin now."""
        if self.request.settings.images == "never":
            return 0
        return self.request.budget - len(self.ids)

    def append(self, token: int, vocabulary: ImageVocabulary) -> None:
        """Add a generated token."""
        self.ids.append(token)
        self.image_tokens += 1
        if token == vocabulary.boi_id:
            self.in_image = True
            self.image_tokens = 0
        elif token == vocabulary.eoi_id:
            self.in_image = False

    def cached_keys(self) -> np.ndarray:
        """The keys of all tokens in the cache, for later prompts with the same beginning."""
        keys = np.concatenate([self.prompt_keys, np.array(self.ids, dtype=np.int64)])
        return keys[: self.n_cached]


class Request:
    """A running request: iterate over its tokens, once; leaving the iteration cancels the request.

    The iteration raises the request's error. `ended` is set by either thread: by the engine's when
    the answer is complete or failed, by the caller's when it cancels. The engine frees the rows.

    initial_ids: ids of the answer that the prompt holds (`Prompt.answered`, a forced `<img>`).
    budget: new tokens at most.
    reader: parses the answer while it is generated, and finds its stops. `previews`: see there.
    finish_reason: "stop" (an end token or a stop), "length" (the budget) or None (neither yet).
    chooser: of sampled requests, and of those whose log-probabilities are asked for.
    answers: with beams the best ones, when all are finished; the iteration gives the first.
    """

    def __init__(
        self,
        prompt: Prompt,
        settings: GenerationSettings,
        *,
        tokenizer: TextTokenizer,
        device: torch.device,
        budget: int,
        states: dict[int, Tensor] | None = None,
        should_stop: Callable[[], bool] | None = None,
        previews: Sequence[int] = (),
        log_probs: bool = False,
        forced_ids: Sequence[int] | None = None,
    ) -> None:
        vocabulary = tokenizer.vocabulary
        forced = [vocabulary.boi_id] if settings.forces_image else []
        self.settings = settings
        self.initial_ids = [*prompt.answered, *forced]
        end_ids = settings.stop_token_ids
        self.end_ids = list(tokenizer.eos_token_ids if end_ids is None else end_ids)
        self.budget = budget
        self.should_stop = should_stop
        self.states = states if vocabulary.fixed_image_order else None
        self.seed: int | None = None
        if settings.samples:
            self.seed = random_seed() if settings.seed is None else settings.seed
        self.chooser: TokenChooser | None = None
        records = log_probs or forced_ids is not None
        if settings.samples or records:
            self.chooser = TokenChooser(settings, self.seed, device, forced_ids, records)
        self.finish_reason: str | None = None
        self.answers: list[list[int]] = []
        self.ended = False
        self.processors: list[LogitsProcessor] = []  # the engine sets them when it starts
        self.reader = AnswerReader(tokenizer, settings.stop, previews, settings.stop_after)
        self._first_events: list[Event] = []
        for token in self.initial_ids:
            self._first_events += self.reader.read(token)
        self._stream: queue.SimpleQueue[StreamItem] = queue.SimpleQueue()

        # The sequences in rows of the cache: one for a beam, and one more for each with guidance.
        sequence = self._sequence(prompt, forced)
        sequence.in_image = self.initial_ids[-1:] == [vocabulary.boi_id]
        # Written while the answer is generated.
        if self.states is not None:
            sequence.hidden_states = self.states
        if settings.guidance != 1:
            negative = Prompt(prompt.negative or [vocabulary.boi_id])
            sequence.unconditional = self._sequence(negative, [])
            sequence.unconditional.is_unconditional = True
        self.sequences = [sequence]

    def _sequence(self, prompt: Prompt, forced: Sequence[int]) -> TokenSequence:
        complete = Prompt([*prompt.ids, *forced], prompt.images)
        return TokenSequence(self, complete, complete.prefix_keys())

    @property
    def rows(self) -> list[TokenSequence]:
        """All sequences that have or need a row of the cache now."""
        unconditional = [sequence.unconditional for sequence in self.sequences]
        return [*self.sequences, *(sequence for sequence in unconditional if sequence is not None)]

    @property
    def max_rows(self) -> int:
        """Rows of the cache that the request needs at most."""
        return max(len(self.rows), self.settings.num_beams)

    def searches_as(self, other: Request) -> bool:
        """Whether one beam search can answer both."""
        names = ("budget", "seed", "initial_ids")
        is_equal = all(getattr(self, name) == getattr(other, name) for name in names)
        return is_equal and replace(self.settings, seed=None) == replace(other.settings, seed=None)

    def deliver(self, token: int) -> None:
        """Hand a token to the caller; with stops, after it was read."""
        if self.ended:
            return
        events = self.reader.read(token) if self.settings.stop else None
        self._stream.put((token, events))

    def finish(self, reason: str) -> None:
        """End a complete answer."""
        self.finish_reason = reason
        self.end()

    def end(self, error: BaseException | None = None) -> None:
        """End the answer; the caller's iteration stops, or raises `error`."""
        if not self.ended:
            self.ended = True
            self._stream.put(error)

    def cancel(self) -> None:
        """Deliver nothing more: the iteration stops, and the engine soon frees the rows."""
        self.ended = True
        self._stream.put(None)

    def stop_if_asked(self) -> None:
        """End the request if its caller's `should_stop` is true, or raises."""
        if self.ended or self.should_stop is None:
            return
        try:
            if self.should_stop():
                self.end(Stopped())
        except BaseException as error:  # noqa: BLE001 its error must not end the engine's thread
            self.end(error)

    def __iter__(self) -> Iterator[int]:
        with contextlib.closing(self._items()) as items:
            for token, _ in items:
                yield token

    def events(self) -> Iterator[Event]:
        """The events of the answer (see `language.answer`) in place of its tokens.

        Where `should_stop` ended it, the text so far is complete before `Stopped` is raised.
        """
        yield from self._first_events
        with contextlib.closing(self._items()) as items:
            try:
                for token, events in items:
                    yield from self.reader.read(token) if events is None else events
            except Stopped:
                yield from (event for event in self.reader.close() if event["type"] == "text")
                raise
        yield from self.reader.close()

    def _items(self) -> Generator[tuple[int, list[Event] | None]]:
        try:
            while (item := self._stream.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.cancel()
