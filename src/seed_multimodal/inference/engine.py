"""`Engine`: continuous batching of one language model; each answer equals the one computed alone.

    engine = Engine(TorchBackend(llm), tokenizer)
    request = engine.submit(prompt, settings)      # from any thread
    for token in request: ...                      # leaving the loop cancels the request

One thread owns the model, the cache and all sequences. It repeats, while there is work:

    admit    waiting requests get rows of the cache, and the prefix that another row holds
    prefill  a bounded number of prompt tokens is read, so that running answers do not wait long;
             prompts that are complete get their first token (select)
    decode   each running sequence reads its last token, and gets the next one (select)
    select   guidance, image constraints, processors and sampling choose tokens, which are delivered

A request whose prompts become complete gets two tokens in that step: of prefill and of decode.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from seed_multimodal.errors import GenerationError
from seed_multimodal.inference.backends.base import Backend, NextTokens, PromptChunk
from seed_multimodal.inference.base_engine import BaseEngine
from seed_multimodal.inference.image_constraints import ImageConstraints
from seed_multimodal.inference.inbox import InboxThread
from seed_multimodal.inference.kv_cache import Slot
from seed_multimodal.inference.likelihood import Likelihood
from seed_multimodal.inference.prompt import NO_KEYS, GenerationSettings, Prompt
from seed_multimodal.inference.request import Request, TokenSequence
from seed_multimodal.inference.sampling import (
    LogitsProcessor,
    build_processors,
    not_finite_error,
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
        self.constraints = ImageConstraints(self.vocabulary, original_constraints)
        self._n_forgotten = 0
        self._weights: object = None  # with which new rows are computed
        InboxThread.__init__(self, "seed-engine")

    def _begin(self) -> None:
        super()._begin()
        self._waiting: deque[Request] = deque()
        self.slots = [Slot(row) for row in range(self.n_rows)]
        self.n_decoding = 0
        self.n_active = 0

    def forget(self) -> None:
        """Compute all later prompts anew, after a change of the weights that `Backend.weights` does
        not show, such as other layers between an image's features and its embeddings."""
        self._n_forgotten += 1

    @property
    def n_running(self) -> int:
        # Read once each: the engine's thread frees rows meanwhile.
        sequences = [slot.sequence for slot in list(self.slots)]
        return len({id(sequence.request) for sequence in sequences if sequence is not None})

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
            for prompt, rows in zip(prompts, continuations, strict=True):
                for ids in rows[wave]:
                    settings = GenerationSettings(
                        max_new_tokens=len(ids),
                        do_sample=False,
                        constrain=False,
                        stop_token_ids=(),
                    )
                    requests.append(self._new_request(prompt, settings, forced_ids=ids))
            measured = iter(self._finish(requests))
            for prompt_likelihoods, rows in zip(likelihoods, continuations, strict=True):
                for ids in rows[wave]:
                    chooser = next(measured).chooser
                    assert chooser is not None
                    if len(chooser.log_probs) < len(ids):
                        raise GenerationError("A continuation does not fit the KV cache.")
                    prompt_likelihoods.append(Likelihood(chooser.log_probs, chooser.is_greedy))
        return likelihoods

    # ---- everything below is called by the engine's thread

    def serve(self) -> None:
        """Answer requests until none is left."""
        try:
            self._receive()
            if not self._waiting:  # those of this item came earlier
                return
            with self.backend.ready():
                while self._waiting or self.n_active:
                    self._step()
                    self._receive()
        except Exception as error:  # noqa: BLE001 such as no memory to move the weights
            # Nothing can be answered.
            self._reset(error)

    def _reset(self, error: Exception) -> None:
        """End everything that runs or waits, and start with an empty cache."""
        for request in [*self._waiting, *self._requests(self.slots)]:
            request.end(error)
        self._waiting.clear()
        self.slots = [Slot(row) for row in range(self.n_rows)]
        self.n_decoding = 0
        self.n_active = 0

    def _receive(self) -> None:
        """Take the requests that came since the last step."""
        self._waiting.extend(self._take())

    def _step(self) -> None:
        """A piece of the prompts that are read, then one token more for every running sequence."""
        # 1. Requests whose callers have left, or want to stop, give their rows back.
        for request in [*self._waiting, *self._requests(self.slots)]:
            request.stop_if_asked()
        self._waiting = deque(request for request in self._waiting if not request.ended)
        self._release_ended()

        # 2. New requests, then prompts; a failure ends only the requests of the pass.
        self._admit()
        reading = self._plan_prefill()
        if reading:
            try:
                self._prefill(reading)
            except Exception as error:  # noqa: BLE001 such as out of memory
                self._fail(self._requests(reading), error)
        self._release_ended()

        # 3. The next token of all running sequences.
        decoding = self.slots[: self.n_decoding]
        if decoding:
            try:
                self._decode(decoding)
            except Exception as error:  # noqa: BLE001
                # What the failed pass left in the cache is not known.
                self._fail(self._requests(decoding), error)
        self._release_ended()

    # ---- rows

    def _requests(self, slots: Sequence[Slot]) -> list[Request]:
        """The requests that run in these rows."""
        requests = [slot.sequence.request for slot in slots if slot.sequence is not None]
        return list(dict.fromkeys(requests))

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """End requests with an error, and forget what their rows hold."""
        for request in requests:
            request.end(error)
        for slot in list(self.slots):  # a copy: releasing a row changes the order of the rows
            if slot.sequence is not None and slot.sequence.request in requests:
                self._release(slot, keep=False)

    def _release_ended(self) -> None:
        """Free the rows of ended requests, all those of a request together."""
        # The last row first: rows that end together then leave no gaps.
        for slot in reversed(self.slots[: self.n_active]):
            if slot.sequence is not None and slot.sequence.request.ended:
                self._release(slot)

    def _release(self, slot: Slot, keep: bool = True) -> None:
        """Free a row; with `keep` its content is used for later prompts with the same beginning."""
        sequence = slot.sequence
        assert sequence is not None
        slot.keys = sequence.cached_keys() if keep else NO_KEYS
        slot.sequence = None
        slot.freed_at = time.monotonic()
        # Close the gap: the last decoding row moves here, then the last active one to its place.
        if slot.row < self.n_decoding:
            self.n_decoding -= 1
            self._swap(slot.row, self.n_decoding)
        self.n_active -= 1
        self._swap(slot.row, self.n_active)

    def _swap(self, row_a: int, row_b: int) -> None:
        """Exchange two rows, with their content."""
        if row_a == row_b:
            return
        slot_a = self.slots[row_a]
        slot_b = self.slots[row_b]
        self.backend.swap(row_a, row_b, _n_cached(slot_a), _n_cached(slot_b))
        self.slots[row_a] = slot_b
        self.slots[row_b] = slot_a
        slot_a.row = row_b
        slot_b.row = row_a

    def _admit(self) -> None:
        """Give rows to waiting requests, in the order of their arrival."""
        if self._waiting:
            self._weights = (self._n_forgotten, self.backend.weights())
        while self._waiting:
            request = self._waiting[0]
            if request.max_rows > self.n_rows - self.n_active:
                return
            group = self._take_group()
            try:
                if request.settings.num_beams > 1:
                    self._answer_with_beams(group)
                else:
                    self._start(request)
            except Exception as error:  # noqa: BLE001
                # Of these prompts alone: ids outside the vocabulary, no memory.
                self._fail(group, error)

    def _take_group(self) -> list[Request]:
        """The oldest waiting request; with beams all that one search can answer."""
        oldest = self._waiting[0]
        group = [oldest]
        # With a penalty, transformers' end of a search depends on the rest of the batch.
        is_plain = oldest.seed is None and oldest.settings.repetition_penalty == 1
        if oldest.settings.num_beams > 1 and is_plain:
            group = [request for request in self._waiting if request.searches_as(oldest)]
            group = group[: self.n_rows // oldest.settings.num_beams]
        self._waiting = deque(request for request in self._waiting if request not in group)
        return group

    def _start(self, request: Request) -> None:
        """Prepare a request's prompts and give each a row."""
        for sequence in request.rows:
            sequence.prompt_input = self.backend.prepare(sequence.prompt)
        for sequence in request.rows:
            self._assign_slot(sequence)
        request.processors = self._processors(request)

    def _processors(self, request: Request) -> list[LogitsProcessor]:
        """The logits processors of a request, the sampler last."""
        device = self.backend.device
        processors = build_processors(request.settings, request.end_ids, device)
        if request.chooser is None:
            return processors
        return [*processors, request.chooser]

    def _answer_with_beams(self, requests: Sequence[Request]) -> None:
        """The best answers, by the backend's own beam search; other requests wait for it."""
        assert self.backend.search is not None

        def all_ended() -> bool:
            self._receive()
            for request in requests:
                request.stop_if_asked()
            return all(request.ended for request in requests)

        self.backend.search(requests, self.constraints, self.tokenizer, all_ended)
        for request in requests:
            best = request.answers[0]
            for token in best:
                request.deliver(token)
            has_end = best[-1] in request.end_ids
            is_complete = len(best) < request.budget or has_end or request.reader.found_stop
            request.finish("stop" if is_complete else "length")

    def _assign_slot(self, sequence: TokenSequence) -> None:
        """Assign a row to a sequence, with the longest prefix of its prompt that any row holds."""
        prefix_lengths = [self._reusable_prefix(slot, sequence) for slot in self.slots]
        prefix_length = max(prefix_lengths)
        donor = self.slots[prefix_lengths.index(prefix_length)]

        # 1. An idle row becomes the last active one.
        slot = self._choose_slot(donor, prefix_length)
        n_cached = prefix_length if slot is donor else 0
        slot.keys = sequence.prompt_keys[:n_cached]  # what `_swap` has to move
        self._swap(slot.row, self.n_active)

        # 2. It gets the prefix, where a copy is worth it.
        if slot is not donor and prefix_length >= MIN_COPIED_PREFIX:
            self.backend.copy(donor.row, slot.row, prefix_length)
            n_cached = prefix_length

        # 3. It is counted as soon as it has a sequence: a failure before this frees nothing, and a
        #    failure after it frees the row.
        slot.sequence = sequence
        slot.keys = NO_KEYS
        slot.weights = self._weights
        sequence.n_cached = n_cached
        self.n_active += 1

    def _reusable_prefix(self, slot: Slot, sequence: TokenSequence) -> int:
        """Tokens of a prompt that a row holds, and that may be copied or taken over."""
        if slot.weights != self._weights:
            return 0
        if slot.sequence is not None and not self.backend.cheap_copies:
            return 0
        return slot.common_prefix(sequence.prompt_keys)

    def _choose_slot(self, donor: Slot, prefix_length: int) -> Slot:
        """The idle row for a prompt, of which `donor` holds the first `prefix_length` tokens.

        The donor itself, unless it holds much more, which another conversation may still need;
        otherwise the row that has been idle for the longest time.
        """
        if donor.sequence is None and prefix_length:
            tail = len(donor.keys) - prefix_length
            if not self.backend.cheap_copies or tail <= REPLACEABLE_TAIL:
                return donor
        return self._oldest_idle_slot()

    def _oldest_idle_slot(self) -> Slot:
        return min(self.slots[self.n_active :], key=lambda slot: slot.freed_at)

    # ---- passes

    def _prefill_budget(self) -> int:
        return PREFILL_BESIDE_DECODING if self.n_decoding else PREFILL_ALONE

    def _plan_prefill(self) -> list[Slot]:
        """The rows whose prompts are read next: adjacent ones, as many as fit a pass.

        A row may have nothing to read, and wait for the other prompt of its request: no pass begins
        with it; between others it takes part with an empty chunk.
        """
        budget = self._prefill_budget()
        chosen: list[Slot] = []
        longest = 0
        for slot in self.slots[self.n_decoding : self.n_active]:
            if not chosen and _n_unread(slot) == 0:
                continue
            longest = max(longest, _n_unread(slot))
            if chosen and (len(chosen) + 1) * longest > budget:
                break
            chosen.append(slot)
        return chosen

    def _prefill(self, slots: Sequence[Slot]) -> None:
        """Read a piece of each row's prompt; after its last one a request gets its first token."""
        # 1. The pass.
        sequences = _sequences(slots)
        budget = self._prefill_budget()
        chunks: list[PromptChunk] = []
        for sequence in sequences:
            stop = min(sequence.n_prompt, sequence.n_cached + budget)
            chunks.append(PromptChunk(sequence.prompt_input, sequence.n_cached, stop))
        computed = self.backend.prefill(slots[0].row, chunks)

        # 2. Scores after a whole prompt are kept: with guidance the first token needs those of two
        #    prompts.
        for index, (sequence, chunk) in enumerate(zip(sequences, chunks, strict=True)):
            sequence.n_cached = chunk.stop
            if sequence.prompt_is_read and sequence.scores is None:
                sequence.prompt_input = None
                sequence.scores = computed.scores[index]
                sequence.state = None if computed.states is None else computed.states[index]

        # 3. Complete requests move to the rows that generate.
        started: list[TokenSequence] = []
        for request in self._requests(slots):
            if all(row.scores is not None for row in request.rows):
                started += request.rows
        for sequence in started:
            self._swap(self._slot_of(sequence).row, self.n_decoding)
            self.n_decoding += 1

        # 4. Their first tokens.
        if started:
            self._select(started, _take_first_scores(started))

    def _decode(self, slots: Sequence[Slot]) -> None:
        """Read the last token of each running sequence, and choose the next one."""
        sequences = _sequences(slots)
        tokens = [sequence.ids[-1] for sequence in sequences]
        positions = [sequence.n_cached for sequence in sequences]
        computed = self.backend.decode(tokens, positions)
        for sequence in sequences:
            sequence.n_cached += 1
        self._select(sequences, computed)

    # ---- choice of the next tokens

    def _select(self, sequences: Sequence[TokenSequence], computed: NextTokens) -> None:
        """Choose and deliver the next tokens; row n of `computed` belongs to sequence n."""
        scores = computed.scores[:, : self.vocabulary.size]  # without rows of padding
        row_of = {id(sequence): row for row, sequence in enumerate(sequences)}
        conditional = [
            row for row, sequence in enumerate(sequences) if not sequence.is_unconditional
        ]

        # 1. Guidance moves the scores away from those of the unconditional prompt.
        for row in conditional:
            unconditional = sequences[row].unconditional
            if unconditional is not None:
                guidance = sequences[row].request.settings.guidance
                scores[row] = _guided(scores[row], scores[row_of[id(unconditional)]], guidance)
        # After guidance, which makes NaN of a conditional row from NaN in either one.
        is_finite = torch.isfinite(scores.amax(dim=-1)).tolist()

        # 3. Images stay well-formed.
        constrained = [row for row in conditional if sequences[row].request.settings.constrain]
        if constrained:
            scores[constrained] = self.constraints.apply(
                scores[constrained], [sequences[row] for row in constrained]
            )

        # 4. Each request's own processors, the sampler last.
        for row in conditional:
            if sequences[row].request.processors and is_finite[row]:
                self._process(sequences[row], scores[row : row + 1])

        # 5. The tokens.
        tokens = scores.argmax(dim=-1).tolist()
        for request in dict.fromkeys(sequences[row].request for row in conditional):
            row = row_of[id(request.sequences[0])]
            if not is_finite[row]:
                self._end_damaged(request)
                continue
            if request.ended:
                continue
            if request.states is not None and computed.states is not None:
                _record_state(request, computed.states[row])
            self._append(request, tokens[row])

    def _process(self, sequence: TokenSequence, scores: Tensor) -> None:
        """Apply a request's processors to its scores `[1, V]`, in place; an error ends it alone."""
        ids = torch.tensor([sequence.ids], dtype=torch.long, device=scores.device)
        try:
            processed = scores
            for process in sequence.request.processors:
                processed = process(ids, processed)
            scores.copy_(processed)
        except Exception as error:  # noqa: BLE001 of this request alone
            sequence.request.end(error)

    def _end_damaged(self, request: Request) -> None:
        """End a request whose scores are NaN, and zero its rows.

        Attention multiplies masked positions by 0, so NaN in them would reach the next sequence.
        """
        for sequence in request.rows:
            self.backend.clear(self._slot_of(sequence).row)
        self._fail([request], not_finite_error())

    def _slot_of(self, sequence: TokenSequence) -> Slot:
        """The row of a sequence."""
        return next(slot for slot in self.slots[: self.n_active] if slot.sequence is sequence)


def _guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance on scores `[V]`, as in transformers."""
    conditional = conditional.log_softmax(dim=-1)
    unconditional = unconditional.log_softmax(dim=-1)
    return guidance * (conditional - unconditional) + unconditional


def _record_state(request: Request, state: Tensor) -> None:
    """Store the state `[D]` at the token before the one that is chosen."""
    sequence = request.sequences[0]
    position = len(request.initial_ids) + len(sequence.ids) - 1
    sequence.hidden_states[position] = state.clone()


def _sequences(slots: Sequence[Slot]) -> list[TokenSequence]:
    return [slot.sequence for slot in slots if slot.sequence is not None]


def _n_cached(slot: Slot) -> int:
    """Tokens whose keys and values a row holds."""
    return len(slot.keys) if slot.sequence is None else slot.sequence.n_cached


def _n_unread(slot: Slot) -> int:
    """Prompt tokens that a row has still to read."""
    return 0 if slot.sequence is None else slot.sequence.n_prompt - slot.sequence.n_cached


def _take_first_scores(sequences: Sequence[TokenSequence]) -> NextTokens:
    """Scores and states after the prompts; they are given up, being views of a whole pass."""
    scores = [sequence.scores for sequence in sequences if sequence.scores is not None]
    states = [sequence.state for sequence in sequences if sequence.state is not None]
    for sequence in sequences:
        sequence.scores = None
        sequence.state = None
    return NextTokens(torch.stack(scores), torch.stack(states) if states else None)
