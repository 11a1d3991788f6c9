"""`Engine`: continuous batching of one language model; each answer equals the one computed alone.

    engine = Engine(TorchBackend(llm), tokenizer)
    sequence = engine.submit(prompt, settings)     # from any thread
    for token in sequence: ...                     # leaving the loop cancels the request

One thread owns the model, the cache and all sequences. It repeats, while there is work:

    admit    waiting sequences get rows of the cache, and the prefix that another row holds
    prefill  a bounded number of prompt tokens is read, so that running answers do not wait long;
             prompts that are complete get their first token (choose)
    decode   each running sequence reads its last token, and gets the next one (choose)
    choose   the `Sampler` chooses the tokens of all sequences together, and they are delivered

A request whose prompts become complete gets two tokens in that step: of prefill and of decode.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from seed_multimodal.errors import GenerationError
from seed_multimodal.inference.backends.base import Backend, NextTokens, PromptChunk
from seed_multimodal.inference.base_engine import (
    NO_SCORES,
    BaseEngine,
    GeneratedSequence,
    Likelihood,
    Row,
)
from seed_multimodal.inference.batching import InboxThread
from seed_multimodal.inference.prompt import GenerationSettings, Prompt
from seed_multimodal.inference.sampling import (
    DAMAGED,
    ImageConstraints,
    LogitsProcessor,
    Sampler,
    refuse_damaged,
)
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


class Engine(InboxThread[GeneratedSequence], BaseEngine):
    """Answers by a backend that computes scores.

    The first `n_decoding` rows of the cache generate. Of the others, some read a prompt (`reading`,
    in the order of arrival); idle ones keep what they hold for prompts with the same beginning.

    original_constraints: see `ImageGrammar`.
    """

    def __init__(
        self, backend: Backend, tokenizer: TextTokenizer, *, original_constraints: bool = False
    ) -> None:
        size = backend.cache_size
        BaseEngine.__init__(self, tokenizer, backend.context, size.capacity, size.rows)
        self.backend = backend
        self.has_beams = backend.search is not None
        self.has_axes = backend.has_axes
        self.device = backend.device
        self.original_constraints = original_constraints
        self._sampler = Sampler()
        self._n_forgotten = 0
        self._weights: object = None  # with which new rows are computed
        InboxThread.__init__(self, "seed-engine")

    def _begin(self) -> None:
        super()._begin()
        self._empty()

    def _empty(self) -> None:
        """Nothing waits or runs, and the cache holds nothing."""
        self._waiting: deque[GeneratedSequence] = deque()
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
            rows = [(row, ids) for row, lists in enumerate(continuations) for ids in lists[wave]]
            settings = [
                GenerationSettings(
                    max_new_tokens=len(ids), do_sample=False, constrain=False, stop_token_ids=()
                )
                for _, ids in rows
            ]
            wave_prompts = [prompts[row] for row, _ in rows]
            forced_ids = [ids for _, ids in rows]
            sequences = self.run(wave_prompts, settings, forced_ids=forced_ids, reads=False)
            for (row, ids), sequence in zip(rows, sequences, strict=True):
                if len(sequence.ids) < len(ids):
                    raise GenerationError("A continuation does not fit the KV cache.")
                likelihoods[row].append(Likelihood(sequence.log_probs, sequence.is_greedy))
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
            for sequence in [*self._waiting, *self._sequences(self.rows)]:
                sequence.end(error)
            self._empty()

    def _step(self) -> None:
        """A piece of the prompts that are read, then one token more for every running sequence."""
        # 1. Sequences whose callers have left, or want to stop, give their rows to new ones.
        for sequence in [*self._waiting, *self._sequences(self.rows)]:
            sequence.stop_if_asked()
        self._waiting = deque(sequence for sequence in self._waiting if not sequence.ended)
        self._release_ended()
        self._admit()

        # 2. Prompts are read in the order of arrival, a bounded number of tokens.
        budget = PREFILL_BESIDE_DECODING if self.n_decoding else PREFILL_ALONE
        chunks: list[PromptChunk] = []
        for row in self.reading:
            start = row.n_cached
            stop = min(len(row.keys), start + budget)
            if start < stop and row.prompt_input is not None:
                chunk = PromptChunk(row.index, row.prompt_input, start, stop, row.position_ids)
                chunks.append(chunk)
                budget -= stop - start
        if chunks:
            rows = [self.rows[chunk.row] for chunk in chunks]
            stops = [chunk.stop for chunk in chunks]
            self._compute(rows, stops, partial(self.backend.prefill, chunks))
            self._release_ended()

        # 3. The last token of all running sequences is read.
        decoding = self.rows[: self.n_decoding]
        if decoding:
            tokens = [row.sequence.ids[-1] for row in decoding if row.sequence is not None]
            slots = [row.n_cached for row in decoding]
            position_ids = [row.position_ids for row in decoding]
            stops = [slot + 1 for slot in slots]
            read = partial(self.backend.decode, tokens, slots, position_ids)
            self._compute(decoding, stops, read)

    def _compute(
        self, rows: Sequence[Row], stops: Sequence[int], run: Callable[[], NextTokens]
    ) -> None:
        """A pass in these rows, and the next token of each sequence whose prompts are complete.

        stops: tokens in each row after the pass. A failure ends only the sequences of these rows.
        """
        try:
            # 1. What it computed is kept in the rows until the next token is chosen.
            computed = run()
            for index, (row, stop) in enumerate(zip(rows, stops, strict=True)):
                row.n_cached = stop
                row.scores = computed.scores[index, : self.vocabulary.size]  # without padding
                row.state = None if computed.states is None else computed.states[index]

            # 2. Sequences whose prompts became complete move to the rows that generate; with
            #    guidance they need the scores after two prompts.
            complete: list[GeneratedSequence] = []
            for sequence in self._sequences(rows):
                if all(row.n_cached >= len(row.keys) for row in sequence.rows):
                    complete.append(sequence)
            for row in [row for sequence in complete for row in sequence.rows]:
                if row in self.reading:
                    row.prompt_input = None
                    self._swap(row, self.n_decoding)
                    self.reading.remove(row)
                    self.n_decoding += 1

            # 3. Their next tokens.
            groups: defaultdict[object, list[GeneratedSequence]] = defaultdict(list)
            for sequence in complete:
                groups[sequence.sampling_key].append(sequence)
            for group in groups.values():
                self._choose(group)
        except Exception as error:  # noqa: BLE001 such as out of memory
            # What a failed pass left in the cache is not known.
            self._fail(self._sequences(rows), error)

    def _choose(self, sequences: Sequence[GeneratedSequence]) -> None:
        """Choose and append the next token of sequences with the same `sampling_key`; where that
        fails, of each alone."""
        try:
            tokens = list(self._sampler.choose(sequences))
        except Exception as error:  # noqa: BLE001 such as an end token outside of the vocabulary
            if len(sequences) == 1:
                self._fail(sequences, error)
                return
            for sequence in sequences:
                self._choose([sequence])
            return
        for sequence, token in zip(sequences, tokens, strict=True):
            if token.is_sound:
                state = sequence.rows[0].state
                sequence.append(token.id, token.log_prob, token.is_likeliest, state)
                continue
            # Attention multiplies masked positions by 0, so NaN in them would reach the next
            # sequence there.
            for row in sequence.rows:
                self.backend.clear(row.index)
            self._fail([sequence], GenerationError(DAMAGED))

    # ---- rows

    def _sequences(self, rows: Sequence[Row]) -> list[GeneratedSequence]:
        """The sequences that run in these rows."""
        sequences = [row.sequence for row in rows]
        return [sequence for sequence in dict.fromkeys(sequences) if sequence is not None]

    def _fail(self, sequences: Sequence[GeneratedSequence], error: Exception) -> None:
        """End sequences with an error, and forget what their rows hold."""
        for sequence in sequences:
            sequence.end(error)
            for row in list(sequence.rows):
                self._release(row, keep=False)

    def _release_ended(self) -> None:
        """Free the rows of ended sequences."""
        ended = [row for row in self.rows if row.sequence is not None and row.sequence.ended]
        for row in reversed(ended):  # rows at the end of those that generate leave no gap
            self._release(row)

    def _release(self, row: Row, keep: bool = True) -> None:
        """Free a row; with `keep` its content is used for later prompts with the same beginning."""
        assert row.sequence is not None
        row.sequence.rows.remove(row)
        keys = np.concatenate([row.keys, np.array(row.sequence.ids, dtype=np.int64)])
        row.n_cached = row.n_cached if keep else 0
        row.keys = keys[: row.n_cached]
        row.sequence = None
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
        """Give rows to waiting sequences, in the order of their arrival."""
        weights: object = None
        while self._waiting:
            sequence = self._waiting[0]
            if sequence.n_rows > self.n_rows - self.n_decoding - len(self.reading):
                return
            if weights is None:
                weights = (self._n_forgotten, self.backend.weights())
                if weights != self._weights:  # else rows keep the same object: compared quickly
                    self._weights = weights
            if sequence.settings.num_beams > 1:
                self._answer_with_beams()
                continue
            self._waiting.popleft()
            try:
                for prompt in sequence.prompts:
                    self._assign_row(sequence, prompt)
            except Exception as error:  # noqa: BLE001
                # Of this prompt alone: ids outside the vocabulary, no memory.
                self._fail([sequence], error)

    def _assign_row(self, sequence: GeneratedSequence, prompt: Prompt) -> None:
        """Assign an idle row to a prompt, with the longest prefix of it that any row holds."""
        # 1. The row that holds most of the prompt, whose last token is always computed.
        prompt_input = self.backend.prepare(prompt)
        keys = prompt.prefix_keys()
        prefix_length = 0
        for candidate in self.rows:
            is_usable = candidate.sequence is None or self.backend.cheap_copies
            if is_usable and candidate.weights == self._weights:
                length = min(len(candidate.keys), candidate.n_cached, len(keys) - 1)
                differences = np.flatnonzero(candidate.keys[:length] != keys[:length])
                if len(differences):
                    length = int(differences[0])
                if length > prefix_length:
                    prefix_length = length
                    donor = candidate

        # 2. It is taken over, unless another conversation may still need what else it holds;
        #    otherwise the row that has been idle for the longest time gets a copy.
        row = min((row for row in self.rows if row.sequence is None), key=lambda row: row.freed_at)
        row_length = 0
        if prefix_length:
            tail = donor.n_cached - prefix_length
            is_replaceable = not self.backend.cheap_copies or tail <= REPLACEABLE_TAIL
            if donor is row or (donor.sequence is None and is_replaceable):
                row = donor
                row_length = prefix_length
        row.n_cached = row_length
        row.keys = keys[:row_length]
        if row_length < prefix_length and prefix_length >= MIN_COPIED_PREFIX:
            self.backend.copy(donor.index, row.index, prefix_length)
            row.n_cached = prefix_length

        # 3. A failure before this frees nothing, a failure after it frees the row.
        row.sequence = sequence
        row.prompt_input = prompt_input
        row.position_ids = prompt.position_ids
        row.keys = keys
        row.weights = self._weights
        sequence.rows.append(row)
        self.reading.append(row)

    # ---- beams

    def _answer_with_beams(self) -> None:
        """The best answers to the oldest request, and to all that one search can answer with it, by
        the backend's own beam search; other requests wait for it."""
        # 1. With a penalty, transformers' end of a search depends on the rest of the batch.
        oldest = self._waiting[0]
        settings = oldest.settings
        sequences = [oldest]
        if oldest.seed is None and settings.repetition_penalty == 1:
            key = oldest.search_key
            sequences = [sequence for sequence in self._waiting if sequence.search_key == key]
            sequences = sequences[: self.n_rows // settings.num_beams]
        self._waiting = deque(sequence for sequence in self._waiting if sequence not in sequences)

        def all_ended() -> bool:
            self._waiting += self._take()
            for sequence in sequences:
                sequence.stop_if_asked()
            return all(sequence.ended for sequence in sequences)

        # 2. The search.
        assert self.backend.search is not None
        processors: list[LogitsProcessor] = [refuse_damaged]
        if settings.constrain:
            processors.append(ImageConstraints([sequence.grammar for sequence in sequences]))
        try:
            self.backend.search(sequences, processors, self.tokenizer, all_ended)
        except Exception as error:  # noqa: BLE001 of these prompts alone
            self._fail(sequences, error)
            return

        # 3. The best answer of each.
        for sequence in sequences:
            for token in sequence.answers[0][len(sequence.initial_ids) :]:
                sequence.append(token)
            sequence.end("stop")  # unless its tokens have ended it
