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

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.errors import GenerationError
from seed_multimodal.inference.backends.base import Backend, NextTokens, PromptChunk
from seed_multimodal.inference.base_engine import NO_SCORES, BaseEngine, Likelihood, Request, Row
from seed_multimodal.inference.batching import InboxThread
from seed_multimodal.inference.prompt import GenerationSettings, Prompt
from seed_multimodal.inference.sampling import DAMAGED, guided, refuse_damaged
from seed_multimodal.language.text_tokenizer import TextTokenizer

# Prompt tokens of one pass: few while other answers wait for their next token. Prompts share a
# pass, whose attention computes all pairs of tokens: longer ones would cost more than they save.
PREFILL_BESIDE_DECODING = 256
PREFILL_ALONE = 512
# The end of a conversation that its next turn may replace (an end token, a verdict): a row that
# holds no more than this behind a common prefix is taken over instead of copied.
REPLACEABLE_TAIL = 16
# Shorter prefixes are computed again: that costs less than a copy.
MIN_COPIED_PREFIX = 16


class Engine(InboxThread[Request], BaseEngine):
    """Answers by a backend that computes scores.

    The first `n_decoding` rows of the cache generate. Of the others, some read a prompt (`reading`,
    in the order of arrival); idle ones keep what they hold for prompts with the same beginning.

    original_constraints: see `ImageConstraints`.
    """

    def __init__(
        self, backend: Backend, tokenizer: TextTokenizer, *, original_constraints: bool = False
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
        self.reading: list[Row] = []

    def forget(self) -> None:
        self._n_forgotten += 1

    @property
    def n_waiting(self) -> int:
        return len(self._waiting) + self._inbox.qsize()

    def likelihoods(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Likelihood]]:
        likelihoods: list[list[Likelihood]] = [[] for _ in prompts]
        # The first continuations read the prompts; the others copy what the cache then holds.
        for wave in (slice(0, 1), slice(1, None)):
            wave_prompts: list[Prompt] = []
            forced_ids: list[Sequence[int]] = []
            targets: list[list[Likelihood]] = []
            for prompt, rows, target in zip(prompts, continuations, likelihoods, strict=True):
                forced_ids += rows[wave]
                wave_prompts += [prompt] * len(rows[wave])
                targets += [target] * len(rows[wave])
            settings = [
                GenerationSettings(
                    max_new_tokens=len(ids), do_sample=False, constrain=False, stop_token_ids=()
                )
                for ids in forced_ids
            ]
            requests = self.run(wave_prompts, settings, forced_ids=forced_ids)
            for request, target in zip(requests, targets, strict=True):
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
                while self._waiting or self.n_decoding or self.reading:
                    self._step()
                    self._waiting += self._take()
        except Exception as error:  # noqa: BLE001 such as no memory to move the weights
            # Nothing can be answered.
            for request in [*self._waiting, *self._requests(self.rows)]:
                request.end(error)
            self._empty()

    def _step(self) -> None:
        """A piece of the prompts that are read, then one token more for every running sequence."""
        # 1. Requests whose callers have left, or want to stop, give their rows to new ones.
        for request in [*self._waiting, *self._requests(self.rows)]:
            request.stop_if_asked()
        self._waiting = deque(request for request in self._waiting if not request.ended)
        self._release_ended()
        self._admit()

        # 2. Prompts are read in the order of arrival, a bounded number of tokens.
        budget = PREFILL_BESIDE_DECODING if self.n_decoding else PREFILL_ALONE
        chunks: list[PromptChunk] = []
        for row in self.reading:
            start = row.n_cached
            stop = min(len(row.keys), start + budget)
            if start < stop and row.prompt_input is not None:
                chunks.append(PromptChunk(row.index, row.prompt_input, start, stop))
                budget -= stop - start
        if chunks:
            rows = [self.rows[chunk.row] for chunk in chunks]
            stops = [chunk.stop for chunk in chunks]
            self._compute(rows, stops, partial(self.backend.prefill, chunks))
            self._release_ended()

        # 3. The last token of all running sequences is read.
        decoding = self.rows[: self.n_decoding]
        if decoding:
            tokens = [row.request.ids[-1] for row in decoding if row.request is not None]
            positions = [row.n_cached for row in decoding]
            stops = [position + 1 for position in positions]
            self._compute(decoding, stops, partial(self.backend.decode, tokens, positions))

    def _compute(
        self, rows: Sequence[Row], stops: Sequence[int], run: Callable[[], NextTokens]
    ) -> None:
        """A pass in these rows, and the next token of each request whose prompts are complete.

        stops: tokens in each row after the pass. A failure ends only the requests of these rows.
        """
        try:
            # 1. What it computed is kept in the rows until the next token is chosen.
            computed = run()
            for index, (row, stop) in enumerate(zip(rows, stops, strict=True)):
                row.n_cached = stop
                # Without rows of padding.
                row.scores = computed.scores[index : index + 1, : self.vocabulary.size]
                row.state = None if computed.states is None else computed.states[index]

            # 2. Requests whose prompts became complete move to the rows that generate; with
            #    guidance they need the scores after two prompts.
            complete: list[Request] = []
            for request in self._requests(rows):
                if any(row.n_cached < len(row.keys) for row in request.rows):
                    continue
                complete.append(request)
                for row in request.rows:
                    if row in self.reading:
                        row.prompt_input = None
                        self._swap(row, self.n_decoding)
                        self.reading.remove(row)
                        self.n_decoding += 1
            if complete:
                self._choose(complete)
        except Exception as error:  # noqa: BLE001 such as out of memory
            # What a failed pass left in the cache is not known.
            self._fail(self._requests(rows), error)

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
        ended = [row for row in self.rows if row.request is not None and row.request.ended]
        for row in reversed(ended):  # rows at the end of those that generate leave no gap
            self._release(row)

    def _release(self, row: Row, keep: bool = True) -> None:
        """Free a row; with `keep` its content is used for later prompts with the same beginning."""
        assert row.request is not None
        row.request.rows.remove(row)
        keys = np.concatenate([row.keys, np.array(row.request.ids, dtype=np.int64)])
        row.n_cached = row.n_cached if keep else 0
        row.keys = keys[: row.n_cached]
        row.request = None
        row.prompt_input = None
        row.scores = NO_SCORES
        row.state = None
        row.freed_at = time.monotonic()

        # Rows that generate stay together.
        if row in self.reading:
            self.reading.remove(row)
            return
        self.n_decoding -= 1
        self._swap(row, self.n_decoding)

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
        weights: object = None
        while self._waiting:
            request = self._waiting[0]
            if request.n_rows > self.n_rows - self.n_decoding - len(self.reading):
                return
            if weights is None:
                weights = (self._n_forgotten, self.backend.weights())
                if weights != self._weights:  # else rows keep the same object: compared quickly
                    self._weights = weights
            if request.settings.num_beams > 1:
                self._answer_with_beams()
                continue
            self._waiting.popleft()
            try:
                for prompt in request.prompts:
                    self._assign_row(request, prompt)
            except Exception as error:  # noqa: BLE001
                # Of this prompt alone: ids outside the vocabulary, no memory.
                self._fail([request], error)

    def _assign_row(self, request: Request, prompt: Prompt) -> None:
        """Assign an idle row to a prompt, with the longest prefix of it that any row holds."""
        # 1. The row that holds most of the prompt.
        prompt_input = self.backend.prepare(prompt)
        keys = prompt.prefix_keys()
        prefix_length = 0
        for candidate in self.rows:
            is_usable = candidate.request is None or self.backend.cheap_copies
            if is_usable and candidate.weights == self._weights:
                length = candidate.common_prefix(keys)
                if length > prefix_length:
                    prefix_length = length
                    donor = candidate

        # 2. It is taken over, unless another conversation may still need what else it holds;
        #    otherwise the row that has been idle for the longest time gets a copy.
        row = min((row for row in self.rows if row.request is None), key=lambda row: row.freed_at)
        row_length = 0
        if prefix_length:
            tail = donor.n_cached - prefix_length
            is_replaceable = not self.backend.cheap_copies or tail <= REPLACEABLE_TAIL
            if donor is row or (donor.request is None and is_replaceable):
                row = donor
                row_length = prefix_length
        row.n_cached = row_length
        row.keys = keys[:row_length]
        if row_length < prefix_length and prefix_length >= MIN_COPIED_PREFIX:
            self.backend.copy(donor.index, row.index, prefix_length)
            row.n_cached = prefix_length

        # 3. A failure before this frees nothing, a failure after it frees the row.
        row.request = request
        row.prompt_input = prompt_input
        row.keys = keys
        row.weights = self._weights
        request.rows.append(row)
        self.reading.append(row)

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
            processors = [refuse_damaged, *oldest.processors]
            self.backend.search(requests, processors, self.tokenizer, all_ended)
        except Exception as error:  # noqa: BLE001 of these prompts alone
            self._fail(requests, error)
            return

        # 3. The best answer of each.
        for request in requests:
            for token in request.answers[0][len(request.initial_ids) :]:
                request.append(token)
            request.end("stop")  # unless its tokens have ended it

    # ---- choice of the next tokens

    def _choose(self, requests: Sequence[Request]) -> None:
        """Choose and deliver the next token of each request."""
        # 1. The choices; a request whose scores are damaged ends alone: NaN would crash a CUDA
        #    process when a token is sampled.
        rows = [row for request in requests for row in request.rows]
        maxima = torch.cat([row.scores for row in rows]).amax(dim=-1)
        is_sound = dict(zip(rows, maxima.isfinite().tolist(), strict=True))
        tokens: dict[Request, Tensor] = {}
        log_probs: dict[Request, float | None] = {}
        for request in requests:
            try:
                if not all(is_sound[row] for row in request.rows):
                    raise GenerationError(DAMAGED)
                tokens[request], log_probs[request] = self._next_token(request)
            except Exception as error:  # noqa: BLE001 of this request alone
                # Attention multiplies masked positions by 0, so NaN in them would reach the next
                # sequence there.
                for row in request.rows:
                    self.backend.clear(row.index)
                self._fail([request], error)

        # 2. One transfer from the device for all.
        if tokens:
            chosen = torch.cat([*tokens.values()]).tolist()
            for request, token in zip(tokens, chosen, strict=True):
                request.append(token, log_probs[request])

    def _next_token(self, request: Request) -> tuple[Tensor, float | None]:
        """The next token `[1]`, by guidance, the request's processors, and sampling, with
        `records` its log-probability; keeps the hidden state from which it is chosen."""
        # 1. The distribution.
        row = request.rows[0]
        scores = row.scores  # [1, V]
        if len(request.rows) > 1:
            scores = guided(scores, request.rows[1].scores, request.settings.guidance)
        ids = torch.tensor([request.ids], dtype=torch.long, device=scores.device)
        scores = request.processed(ids, scores)

        # 2. The choice.
        if request.forced_ids is not None:
            next_id = request.forced_ids[len(request.ids)]
            token = ids.new_tensor([next_id])
        elif request.generator is not None:
            probabilities = scores.softmax(dim=-1)
            token = torch.multinomial(probabilities, 1, generator=request.generator)[0]
        else:
            token = scores.argmax(dim=-1)
        log_prob = None
        if request.records:
            log_prob = float(scores.log_softmax(dim=-1)[0, token])
            request.is_greedy &= bool(token == scores.argmax(dim=-1))
        if request.states is not None and row.state is not None:
            request.states.append(row.state.clone())
        return token, log_prob
