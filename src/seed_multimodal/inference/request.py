"""The running `Request`, and the rows of the KV cache in which it runs."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.errors import GenerationError
from seed_multimodal.inference.prompt import (
    NO_KEYS,
    GenerationSettings,
    Prompt,
    PromptInput,
    Stopped,
    random_seed,
)
from seed_multimodal.inference.sampling import LogitsProcessor
from seed_multimodal.language.answer import AnswerReader, Event
from seed_multimodal.language.text_tokenizer import TextTokenizer

NO_SCORES = torch.zeros(0)
# What the engine hands to the caller: a token with its events, an error, or None (the end).
StreamItem = tuple[int, list[Event]] | BaseException | None


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

    @property
    def is_read(self) -> bool:
        """Whether the cache holds the whole prompt."""
        return self.n_cached >= len(self.keys)

    def common_prefix(self, prompt_keys: np.ndarray) -> int:
        """Tokens at the beginning of a prompt that the row holds; the last is always computed."""
        length = min(len(self.keys), self.n_cached, len(prompt_keys) - 1)
        if length <= 0:
            return 0
        differs = self.keys[:length] != prompt_keys[:length]
        first_difference = int(differs.argmax())
        return first_difference if differs[first_difference] else length

    def free(self, keep: bool) -> None:
        """End the request's use of the row; with `keep` later prompts with the same beginning use
        its tokens."""
        assert self.request is not None
        self.request.rows.remove(self)
        keys = np.concatenate([self.keys, np.array(self.request.ids, dtype=np.int64)])
        self.n_cached = self.n_cached if keep else 0
        self.keys = keys[: self.n_cached]
        self.request = None
        self.prompt_input = None
        self.scores = NO_SCORES
        self.state = None
        self.freed_at = time.monotonic()


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
    rows: of the cache, one for each prompt. processors, generator: for the choice of tokens. The
    engine sets these when the request starts.
    """

    def __init__(
        self,
        prompt: Prompt,
        settings: GenerationSettings,
        *,
        tokenizer: TextTokenizer,
        budget: int,
        previews: Sequence[int] = (),
        records: bool = False,
        forced_ids: Sequence[int] | None = None,
    ) -> None:
        # 1. What is asked.
        vocabulary = tokenizer.vocabulary
        forced = [vocabulary.boi_id] if settings.forces_image else []
        self.prompt = prompt
        self.settings = settings
        self.prompts = [Prompt([*prompt.ids, *forced], prompt.images)]
        if settings.guidance != 1:
            self.prompts.append(Prompt(prompt.negative or [vocabulary.boi_id]))
        self.initial_ids = [*prompt.answered, *forced]
        end_ids = settings.stop_token_ids
        self.end_ids = list(tokenizer.eos_token_ids if end_ids is None else end_ids)
        self.budget = budget
        self.image_budget = 0 if settings.images == "never" else budget
        self.records = records or forced_ids is not None
        self.forced_ids = forced_ids
        self.seed: int | None = None
        if settings.samples:
            self.seed = random_seed() if settings.seed is None else settings.seed

        # 2. The answer.
        self.ids: list[int] = []
        self.states: list[Tensor] | None = [] if vocabulary.fixed_image_order else None
        self.log_probs: list[float] = []
        self.is_greedy = True
        self.finish_reason = "cancelled"
        self.answers: list[list[int]] = []
        self.ended = False
        self.reader = AnswerReader(tokenizer, settings.stop, previews, settings.stop_after)
        self._first_events: list[Event] = []
        for token in self.initial_ids:
            self._first_events += self.reader.read(token)
        self._stream: queue.SimpleQueue[StreamItem] = queue.SimpleQueue()

        # 3. What the engine computes with.
        self.rows: list[Row] = []
        self.processors: list[LogitsProcessor] = []
        self.generator: torch.Generator | None = None

    @property
    def n_rows(self) -> int:
        """Rows of the cache that the request needs."""
        return max(len(self.prompts), self.settings.num_beams)

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

    def searches_as(self, other: Request) -> bool:
        """Whether one beam search can answer both."""
        names = ("budget", "seed", "initial_ids")
        is_equal = all(getattr(self, name) == getattr(other, name) for name in names)
        return is_equal and replace(self.settings, seed=None) == replace(other.settings, seed=None)

    def append(self, token: int) -> None:
        """Add a token to the answer, hand it to the caller, and end where it is complete."""
        if self.ended:
            return
        self.ids.append(token)
        self._stream.put((token, self.reader.read(token)))
        if token in self.end_ids or self.reader.found_stop:
            self.end("stop")
        elif len(self.ids) == self.budget:
            self.end("length")

    def end(self, result: str | BaseException) -> None:
        """End the answer by its `finish_reason`, or an error that the caller's iteration raises."""
        if self.ended:
            return
        self.ended = True
        if isinstance(result, str):
            self.finish_reason = result
            self._stream.put(None)
        else:
            self._stream.put(result)

    def cancel(self) -> None:
        """Deliver nothing more: the iteration stops, and the engine soon frees the rows."""
        self.ended = True
        self._stream.put(None)

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

    def __iter__(self) -> Iterator[int]:
        with contextlib.closing(self._items()) as items:
            for token, _ in items:
                yield token

    def events(self) -> Iterator[Event]:
        """The events of the answer (see `language.answer`) in place of its tokens."""
        yield from self._first_events
        with contextlib.closing(self._items()) as items:
            for _, events in items:
                yield from events
        yield from self.reader.close()

    def _items(self) -> Generator[tuple[int, list[Event]]]:
        try:
            while (item := self._stream.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.cancel()
