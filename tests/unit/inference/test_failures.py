"""Failed passes, callers that leave and rows of unequal prompts: no row is lost, and none claims
more than it holds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from waiting import wait_until

from seed_multimodal.errors import GenerationError
from seed_multimodal.inference.backends.base import NextTokens
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.prompt import GenerationSettings, HiddenStates, Prompt
from seed_multimodal.inference.request import Request

GREEDY = GenerationSettings(max_new_tokens=20, do_sample=False, constrain=False)
LONG = replace(GREEDY, max_new_tokens=300, min_new_tokens=300)
GUIDED = replace(GREEDY, guidance=2.0, min_new_tokens=20)


class DamagingBackend(TorchBackend):
    """`on_decode` is called once, with the scores of the next decoding pass."""

    on_decode: Callable[[torch.Tensor], None] | None = None

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> NextTokens:
        computed = super().decode(tokens, positions)
        if self.on_decode is not None:
            on_decode = self.on_decode
            self.on_decode = None
            on_decode(computed.scores)
        return computed


def engine_of(system: Any, max_rows: int = 4) -> tuple[Engine, DamagingBackend]:
    backend = DamagingBackend(system.llm, max_rows=max_rows)
    return Engine(backend, system.tokenizer), backend


def ids_of(variant: int, length: int = 6) -> list[int]:
    return [1, *(3 + (variant * 7 + index) % 290 for index in range(length))]


def tokens_within(request: Request, seconds: float = 8) -> list[int]:
    """The tokens of a request, or AssertionError if it does not end in time."""
    tokens: list[int] = []
    reader = threading.Thread(target=lambda: tokens.extend(request), daemon=True)
    reader.start()
    reader.join(seconds)
    assert not reader.is_alive(), "the request does not end"
    return tokens


def wait_until_idle(engine: Engine) -> None:
    """Until all rows are free."""
    wait_until(lambda: engine.n_active == 0)


def test_guided_prompts_that_do_not_fit_a_pass_together(tiny):
    """Beside a running answer, the second prompt is read after the first one."""
    engine, _ = engine_of(tiny)
    guided = Prompt(ids_of(1, 140), negative=ids_of(2, 150))
    expected = Engine(TorchBackend(tiny.llm), tiny.tokenizer).generate([guided], GUIDED)[0]
    running = iter(engine.submit(Prompt(ids_of(0)), LONG))
    next(running)
    assert tokens_within(engine.submit(guided, GUIDED)) == expected
    running.close()


def test_a_prompt_without_tokens_raises_generation_error(tiny):
    engine, _ = engine_of(tiny)
    with pytest.raises(GenerationError, match="The prompt is empty"):
        tokens_within(engine.submit(Prompt(), GREEDY))


def test_rows_of_a_failed_pass_hold_no_reusable_prefix(tiny):
    engine, backend = engine_of(tiny)

    def run_out_of_memory(scores: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    backend.on_decode = run_out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate([Prompt(ids_of(variant)) for variant in range(3)], GREEDY)
    engine.generate(
        [Prompt([7])], replace(GREEDY, max_new_tokens=1)
    )  # the engine has freed all rows
    assert [len(slot.keys) for slot in engine.slots if len(slot.keys) > 1] == []


def test_a_damaged_guided_request_leaves_no_zeros_to_the_next_one(tiny):
    engine, backend = engine_of(tiny, 2)
    guided = Prompt(ids_of(1), negative=ids_of(2))
    expected = engine.generate([guided], GUIDED)
    backend.on_decode = lambda scores: scores.fill_(float("nan"))
    with pytest.raises(GenerationError, match="not numbers"):
        engine.generate([guided], GUIDED)
    assert engine.generate([guided], GUIDED) == expected


@pytest.mark.parametrize("row", [0, 1], ids=["conditional", "unconditional"])
def test_nan_in_either_prompt_of_guidance_ends_the_request(tiny, row):
    engine, backend = engine_of(tiny, 2)
    backend.on_decode = lambda scores: scores[row].fill_(float("nan"))
    with pytest.raises(GenerationError, match="not numbers"):
        engine.generate([Prompt(ids_of(1), negative=ids_of(2))], GUIDED)


def test_a_damaged_request_whose_caller_leaves_costs_no_other_its_answer(tiny):
    engine, backend = engine_of(tiny)
    expected = engine.generate([Prompt(ids_of(2))], GREEDY)[0]
    requests: list[Request] = []
    started = threading.Event()

    def damage(scores: torch.Tensor) -> None:
        started.wait(20)
        requests[1].cancel()
        scores[:2].fill_(float("nan"))

    backend.on_decode = damage
    submitted = [
        engine._new_request(Prompt(ids_of(variant)), GREEDY, None, None, None, None)
        for variant in range(3)
    ]
    requests += submitted
    engine._enqueue(submitted)
    started.set()
    with pytest.raises(GenerationError, match="not numbers"):
        list(requests[0])
    assert tokens_within(requests[2]) == expected


def test_an_engine_that_is_dropped_after_submit_still_answers(tiny):
    expected = engine_of(tiny)[0].generate([Prompt(ids_of(0))], GREEDY)[0]
    for _ in range(30):
        request = engine_of(tiny)[0].submit(Prompt(ids_of(0)), GREEDY)
        assert tokens_within(request) == expected


def test_cancel_of_another_thread_ends_the_iteration(tiny):
    engine, _ = engine_of(tiny, 1)
    running = engine.submit(Prompt(ids_of(0)), LONG)
    waiting = engine.submit(Prompt(ids_of(1)), GREEDY)
    threading.Timer(0.1, waiting.cancel).start()
    assert tokens_within(waiting) == []
    running.cancel()


def test_a_second_iteration_of_a_request_ends(tiny):
    engine, _ = engine_of(tiny)
    request = engine.submit(Prompt(ids_of(0)), replace(GREEDY, min_new_tokens=20))
    assert len(tokens_within(request)) == 20
    assert tokens_within(request) == []


def test_should_stop_that_exits_ends_its_own_request(tiny):
    """A BaseException, such as asyncio's CancelledError, does not end the engine's thread."""
    engine, _ = engine_of(tiny)

    def exits() -> bool:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        list(engine.submit(Prompt(ids_of(1)), GREEDY, should_stop=exits))
    assert tokens_within(engine.submit(Prompt(ids_of(0)), GREEDY))


def test_running_requests_keep_no_scores_of_their_first_token(tiny):
    """They are views of a tensor with the scores of a whole pass."""
    engine, _ = engine_of(tiny)
    request = engine.submit(Prompt(ids_of(0), negative=ids_of(1)), replace(LONG, guidance=2.0))
    tokens = iter(request)
    next(tokens)
    next(tokens)
    assert [(row.scores, row.state) for row in request.rows] == [(None, None)] * 2
    tokens.close()


def test_states_of_beams_are_those_of_the_answer_alone(tiny_x):
    engine, _ = engine_of(tiny_x)
    settings = replace(GREEDY, num_beams=4, length_penalty=-3.0)
    states = HiddenStates()
    prompts = [Prompt(ids_of(variant)) for variant in range(6)]
    ends = list(range(3, 60))
    answers = engine.generate(prompts, settings, states=states, end_ids=ends)
    assert any(len(ids) < 20 for ids in answers)
    for row, ids in enumerate(answers):
        assert max(states[row], default=-1) < len(ids) - 1


class MovingFailsBackend(TorchBackend):
    """Runs out of memory in the next `swap` or `copy`, whichever `fails` names.

    A failed copy has begun.
    """

    fails = ""

    def _check(self, step: str) -> None:
        if self.fails == step:
            self.fails = ""
            raise torch.OutOfMemoryError(f"CUDA out of memory in {step}")

    def swap(self, row_a: int, row_b: int, length_a: int, length_b: int) -> None:
        self._check("swap")
        super().swap(row_a, row_b, length_a, length_b)

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        self.clear(target)
        self._check("copy")
        super().copy(source, target, start, stop)


@pytest.mark.parametrize("step", ["swap", "copy"])
def test_a_request_that_fails_while_it_gets_a_row_loses_no_row(tiny, step):
    backend = MovingFailsBackend(tiny.llm, max_rows=2)
    engine = Engine(backend, tiny.tokenizer)
    prompts = [Prompt(ids_of(0, 60)), Prompt(ids_of(1, 60))]
    expected = engine.generate(prompts, GREEDY)
    wait_until_idle(engine)
    # A swap: the prompt of the second row. A copy: the first half of what the newest row holds.
    newest = max(engine.slots, key=lambda slot: slot.freed_at)
    slot = engine.slots[1] if step == "swap" else newest
    wanted = next(prompt for prompt in prompts if slot.common_prefix(prompt.prefix_keys()) > 30)
    if step == "copy":
        wanted = Prompt(wanted.ids[:30])
    backend.fails = step
    with pytest.raises(torch.OutOfMemoryError):
        list(engine.submit(wanted, GREEDY))
    wait_until_idle(engine)
    assert (engine.n_active, engine.n_decoding) == (0, 0)
    for prompt, ids in zip(prompts, expected, strict=True):
        assert tokens_within(engine.submit(prompt, GREEDY)) == ids
