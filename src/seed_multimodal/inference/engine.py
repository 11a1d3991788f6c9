"""`Engine`: continuous batching of one language model; each answer equals the one computed alone.

    engine = Engine(TorchBackend(llm), tokenizer)
    request = engine.submit(prompt, settings)      # from any thread
    for token in request: ...                      # leaving the loop cancels the request

One thread owns the model, the cache and all sequences. It repeats, while there is work:

    admit    waiting requests get rows of the cache, and the prefix that another row holds
    prefill  a bounded number of prompt tokens is read, so that running answers do not wait long;
             prompts that are complete get their first token (select)
    decode   each running sequence reads its last token, and gets the next one (select)
    select   guidance, processors (image constraints first) and sampling choose tokens, which are
             delivered

A request whose prompts become complete gets two tokens in that step: of prefill and of decode.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from seed_multimodal.errors import GenerationError
from seed_multimodal.inference.backends.base import Backend, NextTokens, PromptChunk
from seed_multimodal.inference.base_engine import BaseEngine, Likelihood
from seed_multimodal.inference.image_constraints import ImageConstraints
from seed_multimodal.inference.inbox import InboxThread
from seed_multimodal.inference.prompt import GenerationSettings, Prompt
from seed_multimodal.inference.request import Request, Row
from seed_multimodal.inference.sampling import (
    LogitsProcessor,
    build_processors,
    build_warpers,
    guided,
    refuse_damaged,
)
from seed_multimodal.language.text_tokenizer import TextTokenizer

# Prompt tokens of one pass (padding included): few while other answers wait for their next token.
PREFILL_BESIDE_DECODING = 256
PREFILL_ALONE = 2048
# The end of a conversation that its next turn may replace (an end token, a verdict): a row that
# holds no more than this behind a common prefix is taken over instead of copied.
REPLACEABLE_TAIL = 16
# Shorter prefixes are computed again: that costs less than a copy.
MIN_COPIED_PREFIX = 16


class Engine(BaseEngine, InboxThread[Request]):
    """Answers by a backend that computes scores.

    The rows of the cache are in order: first those that generate (`n_decoding`), then those whose
    request still reads a prompt (up to `n_active`), then idle ones, which keep what they hold for
    prompts with the same beginning.

    original_constraints: see `ImageConstraints`.
    """

    has_scores = True

    def __init__(
        self,
        backend: Backend,
        tokenizer: TextTokenizer,
        *,
        original_constraints: bool = False,
    ) -> None:
        size = backend.cache_size
        BaseEngine.__init__(self, tokenizer, backend.context, size.capacity, size.rows)
        self.backend = backend
        self.has_beams = backend.search is not None
        self.device = backend.device
        self.original_constraints = original_constraints
        self._n_forgotten = 0
        self._weights: object = None  # with which new rows are computed
        InboxThread.__init__(self, "seed-engine")

    def _begin(self) -> None:
        super()._begin()
        self._empty()

    def _empty(self) -> None:
        """Nothing waits or runs, and the cache holds nothing."""
        self._waiting: deque[Request] = deque()
        self.rows = [Row(index) for index in range(self.n_rows)]
        self.n_decoding = 0
        self.n_active = 0

    def forget(self) -> None:
        """Compute all later prompts anew, after a change of the weights that `Backend.weights` does
        not show, such as other layers between an image's features and its embeddings."""
        self._n_forgotten += 1

    @property
    def n_waiting(self) -> int:
        return len(self._waiting) + self._inbox.qsize()

    def _enqueue(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._put(request)

    def likelihoods(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Likelihood]]:
        likelihoods: list[list[Likelihood]] = [[] for _ in prompts]
        # The first continuations read the prompts; the others copy what the cache then holds.
        for wave in (slice(0, 1), slice(1, None)):
            requests: list[Request] = []
            targets: list[list[Likelihood]] = []
            for prompt, rows, target in zip(prompts, continuations, likelihoods, strict=True):
                for ids in rows[wave]:
                    settings = GenerationSettings(
                        max_new_tokens=len(ids),
                        do_sample=False,
                        constrain=False,
                        stop_token_ids=(),
                    )
                    requests.append(self._new_request(prompt, settings, forced_ids=ids))
                    targets.append(target)
            for request, target in zip(self._finish(requests), targets, strict=True):
                if len(request.log_probs) < request.settings.max_new_tokens:
                    raise GenerationError("A continuation does not fit the KV cache.")
                target.append(Likelihood(request.log_probs, request.is_greedy))
        return likelihoods

    # ---- everything below is called by the engine's thread

    def serve(self) -> None:
        """Answer requests until none is left."""
        try:
            self._waiting += self._take()
            if not self._waiting:  # those of this item came earlier
                return
            with self.backend.ready():
                while self._waiting or self.n_active:
                    self._step()
                    self._waiting += self._take()
        except Exception as error:  # noqa: BLE001 such as no memory to move the weights
            # Nothing can be answered.
            for request in [*self._waiting, *self._requests(self.rows)]:
                request.end(error)
            self._empty()

    def _step(self) -> None:
        """A piece of the prompts that are read, then one token more for every running sequence."""
        # 1. Requests whose callers have left, or want to stop, give their rows back.
        for request in [*self._waiting, *self._requests(self.rows)]:
            request.stop_if_asked()
        self._waiting = deque(request for request in self._waiting if not request.ended)
        self._release_ended()

        # 2. New requests, then prompts; a failure ends only the requests of the pass. Few prompt
        #    tokens are read while other answers wait for their next token.
        self._admit()
        budget = PREFILL_BESIDE_DECODING if self.n_decoding else PREFILL_ALONE
        reading = self._plan_prefill(budget)
        if reading:
            try:
                self._prefill(reading, budget)
            except Exception as error:  # noqa: BLE001 such as out of memory
                self._fail(self._requests(reading), error)
        self._release_ended()

        # 3. The next token of all running sequences.
        decoding = self.rows[: self.n_decoding]
        if decoding:
            try:
                self._decode(decoding)
            except Exception as error:  # noqa: BLE001
                # What the failed pass left in the cache is not known.
                self._fail(self._requests(decoding), error)

    # ---- rows

    def _requests(self, rows: Sequence[Row]) -> list[Request]:
        """The requests that run in these rows."""
        requests = [row.request for row in rows]
        return [request for request in dict.fromkeys(requests) if request is not None]

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """End requests with an error, and forget what their rows hold."""
        for request in requests:
            request.end(error)
            for row in list(request.rows):
                self._release(row, keep=False)

    def _release_ended(self) -> None:
        """Free the rows of ended requests."""
        # The last row first: rows that end together then leave no gaps.
        for row in reversed(self.rows[: self.n_active]):
            if row.request is not None and row.request.ended:
                self._release(row)

    def _release(self, row: Row, keep: bool = True) -> None:
        """Free a row; with `keep` its content is used for later prompts with the same beginning."""
        row.free(keep)
        # Close the gap: the last decoding row moves here, then the last active one to its place.
        if row.index < self.n_decoding:
            self.n_decoding -= 1
            self._swap(row, self.n_decoding)
        self.n_active -= 1
        self._swap(row, self.n_active)

    def _swap(self, row: Row, index: int) -> None:
        """Exchange a row with the one at `index`, with their content."""
        other = self.rows[index]
        if other is row:
            return
        self.backend.swap(row.index, index, row.n_cached, other.n_cached)
        self.rows[row.index] = other
        self.rows[index] = row
        other.index = row.index
        row.index = index

    def _admit(self) -> None:
        """Give rows to waiting requests, in the order of their arrival."""
        if self._waiting:
            self._weights = (self._n_forgotten, self.backend.weights())
        while self._waiting:
            request = self._waiting[0]
            if request.n_rows > self.n_rows - self.n_active:
                return
            if request.settings.num_beams > 1:
                self._answer_with_beams()
                continue
            self._waiting.popleft()
            try:
                self._start(request)
            except Exception as error:  # noqa: BLE001
                # Of this prompt alone: ids outside the vocabulary, no memory.
                self._fail([request], error)

    def _start(self, request: Request) -> None:
        """Give each prompt of a request a row."""
        for prompt in request.prompts:
            self._assign_row(request, prompt)
        request.processors = self._processors(request)
        if request.seed is not None:
            # It samples what transformers' `generate` samples after `torch.manual_seed`.
            request.generator = torch.Generator(self.device).manual_seed(request.seed)
            request.processors += build_warpers(request.settings)

    def _processors(self, request: Request) -> list[LogitsProcessor]:
        """The logits processors of a request, without those of sampling."""
        settings = request.settings
        processors: list[LogitsProcessor] = [refuse_damaged]
        if settings.constrain:
            vocabulary = self.vocabulary
            opened = request.initial_ids[-1:] == [vocabulary.boi_id]
            processors.append(
                ImageConstraints(
                    vocabulary, opened, request.image_budget, self.original_constraints
                )
            )
        return [*processors, *build_processors(settings, request.end_ids, self.device)]

    def _assign_row(self, request: Request, prompt: Prompt) -> None:
        """Assign a row to a prompt, with the longest prefix of it that any row holds."""
        prompt_input = self.backend.prepare(prompt)
        keys = prompt.prefix_keys()
        prefix_lengths = [self._reusable_prefix(row, keys) for row in self.rows]
        prefix_length = max(prefix_lengths)
        donor = self.rows[prefix_lengths.index(prefix_length)]

        # 1. An idle row becomes the last active one, with what is kept of it.
        row = self._choose_row(donor, prefix_length)
        row.n_cached = prefix_length if row is donor else 0
        row.keys = keys[: row.n_cached]
        self._swap(row, self.n_active)

        # 2. It gets the prefix, where a copy is worth it.
        if row is not donor and prefix_length >= MIN_COPIED_PREFIX:
            self.backend.copy(donor.index, row.index, prefix_length)
            row.n_cached = prefix_length

        # 3. It is counted as soon as it has a request: a failure before this frees nothing, and a
        #    failure after it frees the row.
        row.request = request
        row.prompt_input = prompt_input
        row.keys = keys
        row.weights = self._weights
        request.rows.append(row)
        self.n_active += 1

    def _reusable_prefix(self, row: Row, keys: np.ndarray) -> int:
        """Tokens of a prompt that a row holds, and that may be copied or taken over."""
        if row.weights != self._weights:
            return 0
        if row.request is not None and not self.backend.cheap_copies:
            return 0
        return row.common_prefix(keys)

    def _choose_row(self, donor: Row, prefix_length: int) -> Row:
        """The idle row for a prompt, of which `donor` holds the first `prefix_length` tokens.

        The donor itself, unless it holds much more, which another conversation may still need;
        otherwise the row that has been idle for the longest time.
        """
        if donor.request is None and prefix_length:
            tail = donor.n_cached - prefix_length
            if not self.backend.cheap_copies or tail <= REPLACEABLE_TAIL:
                return donor
        return min(self.rows[self.n_active :], key=lambda row: row.freed_at)

    # ---- beams

    def _answer_with_beams(self) -> None:
        """The best answers to the oldest request, and to all that one search can answer with it, by
        the backend's own beam search; other requests wait for it."""
        # 1. With a penalty, transformers' end of a search depends on the rest of the batch.
        oldest = self._waiting[0]
        requests = [oldest]
        if oldest.seed is None and oldest.settings.repetition_penalty == 1:
            requests = [request for request in self._waiting if request.searches_as(oldest)]
            requests = requests[: self.n_rows // oldest.settings.num_beams]
        self._waiting = deque(request for request in self._waiting if request not in requests)

        def all_ended() -> bool:
            self._waiting += self._take()
            for request in requests:
                request.stop_if_asked()
            return all(request.ended for request in requests)

        # 2. The search.
        assert self.backend.search is not None
        try:
            self.backend.search(requests, self._processors(oldest), self.tokenizer, all_ended)
        except Exception as error:  # noqa: BLE001 of these prompts alone
            self._fail(requests, error)
            return

        # 3. The best answer of each.
        for request in requests:
            best = request.answers[0][len(request.initial_ids) :]
            for token in best:
                request.deliver(token)
            has_end = best[-1] in request.end_ids
            is_complete = len(best) < request.budget or has_end or request.reader.found_stop
            request.finish("stop" if is_complete else "length")

    # ---- passes

    def _plan_prefill(self, budget: int) -> list[Row]:
        """The rows whose prompts are read next: adjacent ones, as many as fit a pass.

        A row may have nothing to read, and wait for the other prompt of its request: no pass begins
        with it; between others it takes part with an empty chunk.
        """
        chosen: list[Row] = []
        longest = 0
        for row in self.rows[self.n_decoding : self.n_active]:
            n_unread = len(row.keys) - row.n_cached
            if not chosen and n_unread == 0:
                continue
            longest = max(longest, n_unread)
            if chosen and (len(chosen) + 1) * longest > budget:
                break
            chosen.append(row)
        return chosen

    def _prefill(self, rows: Sequence[Row], budget: int) -> None:
        """Read a piece of each row's prompt; after its last one a request gets its first token."""
        # 1. The pass.
        chunks: list[PromptChunk] = []
        for row in rows:
            stop = min(len(row.keys), row.n_cached + budget)
            chunks.append(PromptChunk(row.prompt_input, row.n_cached, stop))
        computed = self.backend.prefill(rows[0].index, chunks)
        for index, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
            row.n_cached = chunk.stop
            if chunk.stop == len(row.keys) and row.scores is None:
                self._store(row, computed, index)

        # 2. Requests whose prompts are complete move to the rows that generate; with guidance the
        #    first token needs the scores after two prompts.
        started: list[Request] = []
        for request in self._requests(rows):
            if all(row.scores is not None for row in request.rows):
                started.append(request)
        for request in started:
            for row in request.rows:
                row.prompt_input = None
                self._swap(row, self.n_decoding)
                self.n_decoding += 1
        self._select(started)

    def _decode(self, rows: Sequence[Row]) -> None:
        """Read the last token of each running sequence, and choose the next one."""
        requests: list[Request] = []
        tokens: list[int] = []
        for row in rows:
            assert row.request is not None
            requests.append(row.request)
            tokens.append(row.request.ids[-1])
        computed = self.backend.decode(tokens, [row.n_cached for row in rows])
        for index, row in enumerate(rows):
            row.n_cached += 1
            self._store(row, computed, index)
        self._select(dict.fromkeys(requests))

    def _store(self, row: Row, computed: NextTokens, index: int) -> None:
        """Keep what a pass computed for a row, until the next token is chosen."""
        scores = computed.scores[index : index + 1]
        row.scores = scores[:, : self.vocabulary.size]  # without rows of padding
        row.state = None if computed.states is None else computed.states[index]

    # ---- choice of the next tokens

    def _select(self, requests: Iterable[Request]) -> None:
        """Choose and deliver the next token of each request."""
        for request in requests:
            try:
                self._append(request, self._next_token(request))
            except Exception as error:  # noqa: BLE001 of this request alone
                # Attention multiplies masked positions by 0, so NaN in them would reach the next
                # sequence there.
                for row in request.rows:
                    self.backend.clear(row.index)
                self._fail([request], error)

    def _next_token(self, request: Request) -> int:
        """The next token, by guidance, the request's processors, and sampling; keeps the hidden
        state from which it is chosen."""
        # 1. The distribution.
        scores_by_prompt = [row.scores for row in request.rows if row.scores is not None]
        scores = scores_by_prompt[0]  # [1, V]
        if len(scores_by_prompt) > 1:
            scores = guided(scores, scores_by_prompt[1], request.settings.guidance)
        ids = torch.tensor([request.ids], dtype=torch.long, device=scores.device)
        for process in request.processors:
            scores = process(ids, scores)

        # 2. The choice.
        if request.forced_ids is not None:
            token = request.forced_ids[len(request.ids)]
        elif request.generator is not None:
            probabilities = scores.softmax(dim=-1)
            token = int(torch.multinomial(probabilities, 1, generator=request.generator))
        else:
            token = int(scores.argmax())
        if request.records:
            request.log_probs.append(float(scores.log_softmax(dim=-1)[0, token]))
            request.is_greedy &= token == int(scores.argmax())
        state = request.rows[0].state
        if request.states is not None and state is not None:
            request.states.append(state.clone())
        return token
