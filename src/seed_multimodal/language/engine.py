"""`Engine`: answers to many prompts at once by one language model, each the same as alone.

    engine = Engine(llm, tokenizer, slots=8)
    request = engine.submit(prompt, settings)      # from any thread
    for token in request: ...                      # leaving the loop ends the answer

A prompt waits for a row of the cache, in order of arrival, and takes one that holds its beginning if there is one; what
is new is read in one pass together with other new prompts, then every pass adds a token to each row. One thread
computes. Rows are independent: positions, rules for images, budget, generator, stop and states are each row's own.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seed_multimodal.language.generation import (
    GenerationSettings,
    HiddenStates,
    ImageSpans,
    Prompt,
    Stopped,
    check_finite,
    embedded,
    random_seed,
    room_for,
    row_processors,
)
from seed_multimodal.language.tokenizer import MultimodalTokenizer

NO_DRAWS = GenerationSettings(do_sample=False)
STEP = 128  # the cache grows and is read in multiples of so many positions: few shapes to compile


class SlotCache:
    """Keys and values of every layer, `[slots, H, length, d]` each; every row is written at its own positions."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.rows: Tensor | slice = slice(0)  # those of the present pass
        self.positions = torch.zeros(0)  # of its tokens, [rows, n]
        self.slots = self.length = self.used = 0

    def grow(self, slots: int, length: int) -> None:
        """Make room for so many rows and positions."""
        self.slots, self.length = max(self.slots, slots), max(self.length, -(-length // STEP) * STEP)
        for number, layer in enumerate(self.layers):
            if layer[0].shape[::2] != (self.slots, self.length):
                new = [old.new_zeros(self.slots, old.shape[1], self.length, old.shape[3]) for old in layer]
                for table, old in zip(new, layer, strict=True):
                    table[:len(old), :, :old.shape[2]] = old
                self.layers[number] = (new[0], new[1])

    def swap(self, one: int, other: int) -> None:
        """Exchange two rows."""
        for layer in self.layers:
            for table in layer:
                table[[one, other]] = table[[other, one]]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values `[rows, H, n, d]`; returns those of the rows up to `used`. transformers calls it."""
        if layer == len(self.layers):
            room = (self.slots, keys.shape[1], self.length)
            self.layers.append((keys.new_zeros(*room, keys.shape[3]), values.new_zeros(*room, values.shape[3])))
        rows = torch.arange(len(keys), device=keys.device) if isinstance(self.rows, slice) else self.rows
        old_keys, old_values = self.layers[layer]
        old_keys[rows[:, None], :, self.positions] = keys.transpose(1, 2)
        old_values[rows[:, None], :, self.positions] = values.transpose(1, 2)
        return old_keys[self.rows, :, :self.used], old_values[self.rows, :, :self.used]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.used


class Request:
    """One answer on its way: iterate over its tokens. An error that ends it is raised there."""

    def __init__(self, engine: Engine, prompt: Prompt, settings: GenerationSettings, *, seed: int | None = None,
                 ends: Sequence[int] | None = None, states: tuple[HiddenStates, int] | None = None,
                 should_stop: Callable[[], bool] | None = None, is_guide: bool = False) -> None:
        words = engine.tokenizer.vocabulary
        forced = [words.boi_id] if settings.force_image else []
        self.answered = [*prompt.answered, *forced]  # ids that belong to the answer already
        self.prompt, self.forced, self.embeds = prompt, forced, torch.zeros(0)  # [n, D] from when it has a row
        self.left = room_for(len(prompt) + len(forced), settings, engine.llm, words)
        self.inside, self.done = self.answered[-1:] == [words.boi_id], 0  # an image, and its words so far
        self.settings, self.should_stop, self.states = settings, should_stop, None
        if states is not None:
            states[0].first, self.states = len(self.answered) - 1, states[0].rows[states[1]]
        self.ends = [engine.tokenizer.eos_id] if ends is None else list(ends)
        seed = settings.seed if seed is None else seed
        self.seed = None if not settings.samples else random_seed() if seed is None else seed
        self.processors: list[Any] = []
        self.ids: list[int] = []
        self.guide: Request | None = None  # what guidance steers away from: a row that follows this one
        self.is_guide, self.finished = is_guide, False
        if settings.guidance != 1:
            self.guide = Request(engine, Prompt(prompt.negative or [words.boi_id]), NO_DRAWS, is_guide=True)
        self.tokens: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[int]:
        try:
            while (item := self.tokens.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.finished = True

    def end(self, error: BaseException | None = None) -> None:
        """No more tokens come."""
        self.finished = True
        self.tokens.put(error)


class Row:
    """A row of the cache: what it holds, and for which request."""

    def __init__(self) -> None:
        self.request: Request | None = None
        self.held: Tensor | None = None  # the embeddings whose keys and values it holds, [n, D]

    def common(self, embeds: Tensor) -> int:
        """How many positions it holds of a prompt, of which the last token is always computed."""
        if self.held is None:
            return 0
        n = min(len(self.held), len(embeds) - 1)
        return int((self.held[:n] == embeds[:n]).all(1).cumprod(0).sum())


class Engine:
    """Answers to prompts by a language model; `slots`: rows at once (guidance takes two); `length`: positions to keep
    free; `compiled`: by `torch.compile`, which takes from seconds to minutes at the first tokens."""

    def __init__(self, llm: Any, tokenizer: MultimodalTokenizer, slots: int = 16, length: int = 0, *,
                 compiled: bool = False) -> None:
        self.llm, self.tokenizer, self.slots = llm, tokenizer, max(slots, 2)
        self.spans, self.cache = ImageSpans(tokenizer.vocabulary), SlotCache()
        self.rows: list[Row] = []  # those with a request come first; the others, the last used first
        self.active = 0
        if length:
            self.cache.grow(self.slots, length)
            self.rows = [Row() for _ in range(self.slots)]
        self.device: torch.device | None = None  # where an off-loaded model computes
        self._decode = torch.compile(self._pass) if compiled else self._pass
        self._thread = ThreadPoolExecutor(1, "seed-engine")
        self._lock, self._waiting, self._busy = threading.Lock(), deque[Request](), False

    # ---- for any thread

    def submit(self, prompt: Prompt, settings: GenerationSettings, **how: Any) -> Request:
        """Begin an answer without beams; raises `GenerationError` as `generate`. `how`: `seed`, `ends`, `should_stop`
        as there; `states`: where the last hidden states go, and as which answer's."""
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
        if seeds is None:
            unknown = settings.samples and settings.seed is None
            seeds = [random_seed() if unknown else settings.seed or 0 for _ in prompts]
        prompts = [prompt for prompt in prompts for _ in range(count)]
        seeds = [(seed + number) % 2**63 for seed in seeds for number in range(count)]
        sinks = [None if states is None else (states, row) for row in range(len(prompts))]
        requests = [Request(self, prompt, settings, seed=seed, states=sink, **how)
                    for prompt, seed, sink in zip(prompts, seeds, sinks, strict=True)]
        self._begin(requests)
        try:
            return [[*request.answered, *request] for request in requests]
        finally:
            for request in requests:
                request.finished = True

    def run(self, work: Callable[[], Any]) -> Any:
        """Use the language model for something else (beams) between two passes; returns what `work` returns."""
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
        """One more token for every answer, new ones included; and again while there are any."""
        self._place_model(True)
        try:
            self._admit()
            if self.active:
                self._step()
        except Exception as error:  # noqa: BLE001 a pass failed, as for want of memory: its answers end with it
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
        """An off-loaded model is on its device while there is work."""
        place = self.device if working else torch.device("cpu")
        if self.device is not None and self.llm.device != place:
            self.llm.to(place)
            torch.cuda.empty_cache()

    def _admit(self) -> None:
        """Give waiting requests a row each, and read their prompts in one pass."""
        new: list[tuple[Request, int]] = []  # and how much of it its row holds
        while self._waiting:
            request = self._waiting[0]
            pair = [request] if request.guide is None else [request, request.guide]
            if self.active + len(pair) > self.slots:
                break
            self._waiting.popleft()
            try:
                new += [] if request.finished else [(one, self._place(one)) for one in pair]
            except Exception as error:  # noqa: BLE001 words that are none, of this prompt alone
                request.end(error)
        if not new:
            return
        starts = [start for _, start in new]
        longest = max(len(request.embeds) - start for request, start in new)
        self._make_room(max(starts) + longest)
        embeds = torch.stack([F.pad(request.embeds[start:], (0, 0, 0, longest - len(request.embeds) + start))
                              for request, start in new])
        device = embeds.device
        self.cache.rows = torch.arange(self.active - len(new), self.active, device=device)
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(longest, device=device)
        last = torch.tensor([len(request.embeds) - start - 1 for request, start in new], device=device)
        self._choose([request for request, _ in new], *self._pass(embeds, positions, last))

    def _place(self, request: Request) -> int:
        """Put a request into the best free row; returns how many positions of its prompt are there already."""
        request.embeds = embedded(request.prompt, request.forced, self.llm.get_input_embeddings())
        request.processors = row_processors(request.settings, request.seed, request.ends, request.embeds.device)
        shared = [row.common(request.embeds) for row in self.rows[self.active:]]
        best = max(range(len(shared)), key=shared.__getitem__, default=0)
        if not shared or not shared[best]:  # the one whose last use is longest ago, or a new one
            best = len(shared) - 1
            if not shared:
                self.rows.append(Row())
                self.cache.grow(len(self.rows), 0)
                shared, best = [0], 0
        start, row = shared[best], self.rows[self.active + best]
        self._swap(self.active, self.active + best)
        row.request, row.held = request, None
        self.active += 1
        return start

    def _step(self) -> None:
        """One more token for every answer."""
        requests: list[Any] = [row.request for row in self.rows[:self.active]]
        places = [len(one.embeds) + len(one.ids) - 1 for one in requests]
        self._make_room(max(places) + 1)
        embed = self.llm.get_input_embeddings()
        device = embed.weight.device
        self.cache.rows = slice(self.active)
        tokens = torch.tensor([[one.ids[-1]] for one in requests], device=device)
        positions = torch.tensor(places, device=device)[:, None]
        self._choose(requests, *self._decode(embed(tokens), positions, torch.zeros(len(places), dtype=torch.long,
                                                                                   device=device)))

    def _make_room(self, length: int) -> None:
        self.cache.grow(len(self.rows), length)
        self.cache.used = -(-length // STEP) * STEP

    def _pass(self, embeds: Tensor, positions: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `[rows, V]` and last hidden states `[rows, D]` at the tokens `last` of `embeds` `[rows, n, D]`."""
        cache = self.cache
        cache.positions = positions
        seen = torch.arange(cache.used, device=embeds.device) <= positions[:, :, None]
        hidden = self.llm.get_decoder()(inputs_embeds=embeds, attention_mask=seen[:, None], position_ids=positions,
                                        past_key_values=cache, use_cache=True).last_hidden_state
        state = hidden[torch.arange(len(last), device=last.device), last]
        return self.llm.get_output_embeddings()(state).float(), state

    def _choose(self, requests: Sequence[Request], scores: Tensor, states: Tensor) -> None:
        """Choose the next token of each answer, send it, and free the rows of answers that end."""
        finite = torch.isfinite(scores.amax(-1)).tolist()
        leaders = [row for row, request in enumerate(requests) if not request.is_guide]
        for row in leaders:
            if (guide := requests[row].guide) is not None:
                given, away = scores[[row, requests.index(guide)]].log_softmax(-1)
                scores[row] = requests[row].settings.guidance * (given - away) + away
        spans = [row for row in leaders if requests[row].settings.constrain]
        if spans:
            inside, done, left = (torch.tensor([getattr(requests[row], name) for row in spans], device=scores.device)
                                  for name in ("inside", "done", "left"))
            scores[spans] = self.spans.masked(scores[spans], inside, done, left)
        for row in (row for row in leaders if requests[row].processors):
            ids = torch.tensor([requests[row].ids], dtype=torch.long, device=scores.device)
            for process in requests[row].processors:
                scores[row] = process(ids, scores[row:row + 1])[0]
        chosen = scores.argmax(-1).tolist()
        for row in leaders:
            request = requests[row]
            if request.states is not None:
                request.states.append(states[row].clone())
            for one in (request, request.guide) if request.guide is not None else (request,):
                one.ids.append(chosen[row])
            self._sent(request, chosen[row], finite[row])
        for place in reversed(range(self.active)):
            request = self.rows[place].request  # type: ignore[assignment]
            if request.finished:
                self._free(place, request)

    def _sent(self, request: Request, token: int, is_finite: bool) -> None:
        """Send a token, unless the answer is over; follow the rules for images."""
        try:
            if request.should_stop is not None and request.should_stop():
                raise Stopped
            check_finite(is_finite)
        except Exception as error:  # noqa: BLE001 of this answer alone
            request.end(error)
        else:
            words = self.tokenizer.vocabulary
            request.inside = token == words.boi_id or (request.inside and token != words.eoi_id)
            request.done = 0 if token == words.boi_id else request.done + 1
            request.left -= 1
            if not request.finished:
                request.tokens.put(token)
            if token in request.ends or not request.left:
                request.end()
        if request.guide is not None:
            request.guide.finished = request.finished

    def _free(self, place: int, request: Request) -> None:
        """The row keeps what it holds, for a prompt that begins with it."""
        row, embed = self.rows[place], self.llm.get_input_embeddings()
        fed = torch.tensor(request.ids[:-1], dtype=torch.long, device=request.embeds.device)
        row.request, row.held = None, torch.cat([request.embeds, embed(fed)])
        self.active -= 1
        self._swap(place, self.active)

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            self.rows[one], self.rows[other] = self.rows[other], self.rows[one]
            self.cache.swap(one, other)
