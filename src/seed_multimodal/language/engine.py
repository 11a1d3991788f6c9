"""`Engine`: continuous batching of one language model; each answer equals the one computed alone.

    engine = Engine(llm, tokenizer, slots=8)
    request = engine.submit(prompt, settings)      # from any thread
    for token in request: ...                      # leaving the loop cancels the request

Prompts are queued for a row of the KV cache, preferably one with a common prefix; new tokens are prefilled together
with other new prompts, then each forward pass adds a token to every row. One thread computes. Each row has its own
positions, image constraints, token budget, random generator, stop tokens and hidden states.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from seed_multimodal.language.answer import AnswerReader
from seed_multimodal.language.generation import (
    GenerationSettings,
    HiddenStates,
    ImageSpans,
    Prompt,
    Stopped,
    check_finite,
    embedded,
    new_token_budget,
    random_seed,
    row_processors,
)
from seed_multimodal.language.tokenizer import MultimodalTokenizer

KEPT = 4  # conversations whose keys and values are held at least
STEP = 128  # the cache grows in multiples of so many positions
TAIL = 16  # positions at the end of a conversation that its next turn may replace (its stop, a verdict)


class Request:
    """A running request: iterate over its tokens; errors are raised by the iteration."""

    def __init__(self, engine: Engine, prompt: Prompt, settings: GenerationSettings, *, seed: int | None = None,
                 ends: Sequence[int] | None = None, states: dict[int, Tensor] | None = None,
                 should_stop: Callable[[], bool] | None = None) -> None:
        words = engine.tokenizer.vocabulary
        forced = [words.boi_id] if settings.force_image else []
        self.answered = [*prompt.answered, *forced]  # initial ids of the answer
        self.prompt, self.forced, self.embeds = prompt, forced, torch.zeros(0)  # [n, D] once it has a row
        self.left = new_token_budget(len(prompt) + len(forced), settings, engine.llm, words)
        self.inside, self.done = self.answered[-1:] == [words.boi_id], 0  # an image, and its words so far
        self.settings, self.should_stop, self.states = settings, should_stop, states if words.in_order else None
        self.ends = [engine.tokenizer.eos_id] if ends is None else list(ends)
        seed = settings.seed if seed is None else seed
        self.seed = None if not settings.samples else random_seed() if seed is None else seed
        self.processors: list[Any] = []
        self.reader: AnswerReader | None = None  # finds the stops of the settings in the answer's text
        if settings.stop:
            self.reader = AnswerReader(engine.tokenizer, settings.stop, after=settings.stop_after)
            for token in self.answered:
                self.reader.read(token)
        self.ids, self.start = list[int](), 0  # and how much of the prompt its row held already
        self.finished, self.pair = False, [self]  # with what guidance steers away from, which has the next row
        if settings.guidance != 1:
            away = Prompt(prompt.negative or [words.boi_id])
            self.pair.append(Request(engine, away, GenerationSettings(do_sample=False)))
            self.pair[1].pair = []
        self.tokens: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[int]:
        try:
            while (item := self.tokens.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.finished = True

    def reaches_stop(self, token: int) -> bool:
        """Whether one of the settings' stops is complete with this token."""
        if self.reader is None:
            return False
        self.reader.read(token)
        return self.reader.finished

    def end(self, error: BaseException | None = None) -> None:
        """End the token stream."""
        self.finished = True
        self.tokens.put(error)


class SlotCache:
    """Keys and values of every layer, `[slots, H, length, d]` each; every row is written at its own positions."""

    copies = True  # parts of rows

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.first = 0  # row of the present pass
        self.positions = torch.zeros(0)  # of its tokens, [rows, n]
        self.slots = self.length = self.used = 0

    def grow(self, slots: int, length: int) -> None:
        """Extend to so many rows and positions."""
        self.slots, self.length = max(self.slots, slots), max(self.length, -(-length // STEP) * STEP)
        for number, layer in enumerate(self.layers):
            if layer[0].shape[::2] != (self.slots, self.length):
                new = [old.new_zeros(self.slots, old.shape[1], self.length, old.shape[3]) for old in layer]
                for table, old in zip(new, layer, strict=True):
                    table[:len(old), :, :old.shape[2]] = old
                self.layers[number] = (new[0], new[1])

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of a row to another."""
        for layer in self.layers:
            for table in layer:
                table[target, :, :length] = table[source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first positions of two rows."""
        for layer in self.layers:
            for table in layer:
                kept = table[one, :, :length].clone()
                table[one, :, :length] = table[other, :, :length]
                table[other, :, :length] = kept

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values `[rows, H, n, d]`; returns those of the rows up to `used`. transformers calls it."""
        if layer == len(self.layers):
            self.layers.append(tuple(new.new_zeros(self.slots, new.shape[1], self.length, new.shape[3])
                                     for new in (keys, values)))
            for table in self.layers[layer]:
                torch._dynamo.mark_static_address(table)  # CUDA graphs write to it in place
        rows = torch.arange(self.first, self.first + len(keys), device=keys.device)[:, None]
        held_keys, held_values = self.layers[layer]
        held_keys[rows, :, self.positions] = keys.transpose(1, 2)
        held_values[rows, :, self.positions] = values.transpose(1, 2)
        present = slice(self.first, self.first + len(keys))
        return held_keys[present, :, :self.used], held_values[present, :, :self.used]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.used


@dataclass(eq=False)
class Row:
    """A row of the cache: for which request, and the embeddings `[n, D]` whose keys and values it holds at least."""

    request: Request | None = None
    held: Tensor | None = None
    freed: float = 0  # when its last answer ended

    @property
    def used(self) -> int:
        """Its positions with keys and values."""
        made = 0 if self.request is None else len(self.request.ids)
        return made + (0 if self.held is None else len(self.held))

    def common(self, embeds: Tensor) -> int:
        """Length of the cached prefix of a prompt; the last token is always computed."""
        if self.held is None:
            return 0
        n = min(len(self.held), len(embeds) - 1)
        return int((self.held[:n] == embeds[:n]).all(1).cumprod(0).sum())


class Engine:
    """Answers to prompts by a language model; `slots`: rows at once (guidance takes two). `compiled`: `torch.compile`
    makes the tokens (on CUDA as CUDA graphs), with a cache of `slots` whole contexts; the first token then takes from
    seconds to minutes. `device`: where a model computes that is on the CPU while it rests."""

    def __init__(self, llm: Any, tokenizer: MultimodalTokenizer, slots: int = 16, *, compiled: bool = False,
                 device: torch.device | None = None) -> None:
        self.llm, self.tokenizer, self.slots, self.compiled = llm, tokenizer, max(slots, 2), compiled
        self.spans, self.cache = ImageSpans(tokenizer.vocabulary), SlotCache()
        self.rows: list[Row] = []  # those with a request come first
        self.active, self.device = 0, device
        self._decode = torch.compile(self._pass, mode="reduce-overhead") if compiled else self._pass
        self._thread = ThreadPoolExecutor(1, "seed-engine")
        self._lock, self._waiting, self._busy = threading.Lock(), deque[Request](), False
        if compiled:  # graphs need the same addresses for ever
            self.rows = [Row() for _ in range(self.slots)]
            self.cache.grow(self.slots, int(llm.config.max_position_embeddings) + 1)

    # ---- called from any thread

    def submit(self, prompt: Prompt, settings: GenerationSettings, **how: Any) -> Request:
        """Begin an answer without beams; raises `GenerationError` as `generate`. `how`: `seed`, `ends`, `should_stop`
        as there; `states`: where the last hidden states go (see `HiddenStates`)."""
        request = Request(self, prompt, settings, **how)
        self._begin([request])
        return request

    def _begin(self, requests: Sequence[Request]) -> None:
        with self._lock:
            self._waiting.extend(requests)
            if not self._busy:
                self._busy = True
                self._thread.submit(self._advance)

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings, *, seeds: Sequence[int] | None = None,
                 states: HiddenStates | None = None, **how: Any) -> list[list[int]]:
        """The ids of each answer, `prompt.answered` and a forced `<img>` first; `how`: of `submit`."""
        count = settings.num_return_sequences
        first = [settings.seed] * len(prompts) if seeds is None else seeds
        own = [None if seed is None else (seed + number) % 2**63 for seed in first for number in range(count)]
        prompts = [prompt for prompt in prompts for _ in range(count)]
        requests = [Request(self, prompt, settings, seed=seed, states=None if states is None else states[row], **how)
                    for row, (prompt, seed) in enumerate(zip(prompts, own, strict=True))]
        self._begin(requests)
        try:
            return [[*request.answered, *request] for request in requests]
        finally:
            for request in requests:
                request.finished = True

    def run(self, work: Callable[[], Any]) -> Any:
        """Run other work (beams) with the language model between two passes; returns its result."""
        def call() -> Any:
            self._place_model(True)
            try:
                return work()
            finally:
                self._place_model(self._busy)

        return self._thread.submit(call).result()

    # ---- the engine's thread

    @torch.inference_mode()
    def _advance(self) -> None:
        """Loop: one more token for every request, while there are any."""
        self._place_model(True)
        try:
            self._admit()
            if self.active:
                self._step()
        except Exception as error:  # noqa: BLE001 a failed pass, such as out of memory, ends its requests
            for row in self.rows[:self.active]:
                assert row.request is not None
                row.request.end(error)
                row.request = row.held = None
            self.active = 0
        with self._lock:
            self._busy = bool(self.active or self._waiting)
            if self._busy:
                self._thread.submit(self._advance)
        self._place_model(self._busy)

    def _place_model(self, working: bool) -> None:
        """Context that moves an off-loaded model to its device while there is work."""
        place = self.device if working else torch.device("cpu")
        if self.device is not None and self.llm.device != place:
            self.llm.to(place)
            torch.cuda.empty_cache()

    def _admit(self) -> None:
        """Assign rows to queued requests, and prefill their prompts in one pass."""
        new: list[Request] = []
        while self._waiting and self.active + len(self._waiting[0].pair) <= self.slots:
            request = self._waiting.popleft()
            try:
                for one in request.pair:
                    one.embeds = embedded(one.prompt, one.forced, self.llm.get_input_embeddings())
            except Exception as error:  # noqa: BLE001 invalid ids in this prompt
                request.end(error)
            for one in [] if request.finished else request.pair:
                self._place(one)
                new.append(one)
        if new:
            for row in self.rows[self.active - len(new):self.active]:
                row.held = row.request and row.request.embeds
            rest = [request.embeds[request.start:] for request in new]
            self._read(new, pad_sequence(rest, batch_first=True), [one.start for one in new],
                       [len(one) for one in rest], self._pass)

    def _place(self, request: Request) -> None:
        """Give a request a row, with as many positions of its prompt as any row holds."""
        request.processors = row_processors(request.settings, request.seed, request.ends, request.embeds.device)
        copies = self.cache.copies
        shared = [row.common(request.embeds) if copies or number >= self.active else 0
                  for number, row in enumerate(self.rows)]
        request.start = start = max(shared, default=0)
        place = shared.index(start) if start else 0
        held = self.rows[place].held if start else None
        if held is None or place < self.active or (copies and len(held) > start + TAIL):
            source = place  # a running conversation: copy the common prefix
            if self.active == len(self.rows) or len(self.rows) < min(KEPT, self.slots):
                self.rows.append(Row())
                self.cache.grow(len(self.rows), 0)
            place = min(range(self.active, len(self.rows)), key=lambda number: self.rows[number].freed)
            if start:
                self.cache.copy(source, place, start)
                self.rows[place].held = request.embeds[:start]
        self._swap(self.active, place)
        self.rows[self.active].request, self.rows[self.active].held = request, None
        self.active += 1

    def _step(self) -> None:
        """One more token for every answer; few numbers of rows are compiled."""
        requests: list[Any] = [row.request for row in self.rows[:self.active]]
        count = min(1 << (self.active - 1).bit_length(), self.slots) if self.compiled else self.active
        embed = self.llm.get_input_embeddings()
        tokens = torch.tensor([one.ids[-1] for one in requests] + [0] * (count - self.active),
                              device=embed.weight.device)
        self._read(requests, embed(tokens[:, None]), [len(one.embeds) + len(one.ids) - 1 for one in requests],
                   [1] * count, self._decode)

    def _read(self, requests: Sequence[Request], embeds: Tensor, starts: list[int], lengths: list[int],
              compute: Callable[..., tuple[Tensor, Tensor]]) -> None:
        """Choose the next tokens of the last active rows, after a pass over so many `embeds` `[rows, n, D]` of each."""
        cache, device = self.cache, embeds.device
        end = max(start + length for start, length in zip(starts, lengths, strict=False))
        cache.grow(len(self.rows), end + 1)
        cache.first, nowhere = self.active - len(requests), cache.length - 1  # where padding is written
        first = torch.tensor(starts + [nowhere] * (len(lengths) - len(starts)), device=device)[:, None]
        positions = (first + torch.arange(embeds.shape[1], device=device)).clamp_(max=nowhere)
        places = torch.arange(min(1 << max(7, (end - 1).bit_length()), cache.length), device=device)
        given = embeds, positions, torch.tensor(lengths, device=device) - 1, places
        if self.compiled:
            for tensor in given:  # one graph for any number of rows and positions
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        self._choose(requests, *compute(*given))

    def _pass(self, embeds: Tensor, positions: Tensor, last: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `[rows, V]` and last hidden states `[rows, D]` at the tokens `last` of `embeds` `[rows, n, D]`, which
        see `places` `[used]` up to their own `positions` `[rows, n]`."""
        cache = self.cache
        cache.positions, cache.used = positions, len(places)
        seen = places <= positions[:, :, None]
        hidden = self.llm.get_decoder()(None, seen[:, None], positions, cache,  # its name changed in transformers 5.24
                                        inputs_embeds=embeds, use_cache=True).last_hidden_state
        state = hidden[torch.arange(len(last), device=last.device), last]
        return self.llm.get_output_embeddings()(state).float(), state

    def _choose(self, requests: Sequence[Request], scores: Tensor, states: Tensor) -> None:
        """Select and emit the next token of each request, and free the rows of finished ones."""
        finite = torch.isfinite(scores.amax(-1)).tolist()
        leaders = [row for row, request in enumerate(requests) if request.pair]
        for row in leaders:
            for guide in requests[row].pair[1:]:
                given, away = scores[[row, requests.index(guide)]].log_softmax(-1)
                scores[row] = requests[row].settings.guidance * (given - away) + away
        spans = [row for row in leaders if requests[row].settings.constrain]
        if spans:
            inside, done, left = (torch.tensor([getattr(requests[row], name) for row in spans], device=scores.device)
                                  for name in ("inside", "done", "left"))
            scores[spans] = self.spans.masked(scores[spans], inside, done, left)
        for row in (row for row in leaders if requests[row].processors and finite[row]):
            ids = torch.tensor([requests[row].ids], dtype=torch.long, device=scores.device)
            for process in requests[row].processors:
                scores[row] = process(ids, scores[row:row + 1])[0]
        chosen = scores.argmax(-1).tolist()
        for row in leaders:
            request = requests[row]
            if request.states is not None:  # of the word before
                request.states[len(request.answered) + len(request.ids) - 1] = states[row].clone()
            for one in request.pair:
                one.ids.append(chosen[row])
            self._sent(request, chosen[row], finite[row])
        for place in reversed(range(self.active)):
            request = self.rows[place].request  # type: ignore[assignment]
            if request.finished:
                self._free(place, request)

    def _sent(self, request: Request, token: int, is_finite: bool) -> None:
        """Emit a token, unless the request is finished; track image state."""
        try:
            if request.should_stop is not None and request.should_stop():
                raise Stopped
            check_finite(is_finite)
            reaches_stop = request.reaches_stop(token)
        except Exception as error:  # noqa: BLE001 ends this request only
            reaches_stop = False
            request.end(error)
        words = self.tokenizer.vocabulary
        request.inside = token == words.boi_id or (request.inside and token != words.eoi_id)
        request.done = 0 if token == words.boi_id else request.done + 1
        request.left -= 1
        if not request.finished:
            request.tokens.put(token)
        if token in request.ends or reaches_stop or not request.left:
            request.end()
        for guide in request.pair[1:]:
            guide.finished = request.finished

    def _free(self, place: int, request: Request) -> None:
        """Free the row, keeping its content for prefix reuse."""
        row, embed = self.rows[place], self.llm.get_input_embeddings()
        fed = torch.tensor(request.ids[:-1], dtype=torch.long, device=request.embeds.device)
        row.request, row.held, row.freed = None, torch.cat([request.embeds, embed(fed)]), time.monotonic()
        self.active -= 1
        self._swap(place, self.active)

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            self.cache.swap(one, other, max(self.rows[one].used, self.rows[other].used))
            self.rows[one], self.rows[other] = self.rows[other], self.rows[one]
