"""The engine's rows, thread and errors: nothing that fails, leaves or waits costs another request
its answer.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from real_processes import run_process
from waiting import wait_until

from seed_multimodal.errors import ConfigError, GenerationError
from seed_multimodal.inference.backends.base import NextTokens, PromptChunk
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.engine import PREFILL_BESIDE_DECODING, Engine
from seed_multimodal.inference.kv_cache import CacheSize, plan_cache
from seed_multimodal.inference.prompt import GenerationSettings, Prompt, Stopped
from seed_multimodal.inference.request import Request

GREEDY = GenerationSettings(max_new_tokens=20, do_sample=False, constrain=False)
LONG = replace(GREEDY, max_new_tokens=300, min_new_tokens=300)


class FaultyBackend(TorchBackend):
    """Raises an out-of-memory error where `fails` says so.

    Counts what is read, and waits for `gate` before a pass.
    """

    def __init__(self, llm: Any, **options: Any) -> None:
        super().__init__(llm, **options)
        self.fails: set[str] = set()
        self.prefilled: list[int] = []  # padded tokens of each pass
        self.decoded: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def _check(self, step: str) -> None:
        self.gate.wait(30)
        if step in self.fails:
            self.fails.discard(step)
            raise torch.OutOfMemoryError(f"CUDA out of memory in {step}")

    @contextmanager
    def ready(self) -> Iterator[None]:
        self._check("ready")
        with super().ready():
            yield

    def prefill(self, first_row: int, chunks: Sequence[PromptChunk]) -> NextTokens:
        self._check("prefill")
        self.prefilled.append(len(chunks) * max(chunk.stop - chunk.start for chunk in chunks))
        return super().prefill(first_row, chunks)

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> NextTokens:
        self._check("decode")
        self.decoded.append(len(tokens))
        return super().decode(tokens, positions)


def faulty_engine(system: Any, max_rows: int = 4) -> tuple[Engine, FaultyBackend]:
    backend = FaultyBackend(system.llm, max_rows=max_rows)
    return Engine(backend, system.tokenizer), backend


def prompt(variant: int, length: int = 6) -> Prompt:
    return Prompt([1, *(3 + (variant * 7 + index) % 290 for index in range(length))])


def is_idle(engine: Engine) -> bool:
    return (
        engine.n_active,
        engine.n_decoding,
        engine.n_reserved,
        engine.n_running,
        engine.n_waiting,
    ) == (0,) * 5


def results(requests: Sequence[Request]) -> list[Any]:
    """The tokens of each request, or its error."""
    outcomes: list[Any] = []
    for request in requests:
        try:
            outcomes.append(list(request))
        except Exception as error:  # noqa: BLE001 whatever the engine delivered
            outcomes.append(error)
    return outcomes


@pytest.mark.parametrize("step", ["ready", "prefill", "decode"])
def test_out_of_memory_ends_the_requests_of_the_step_and_no_later_ones(tiny, step):
    """Every request gets an answer or the error; the engine then answers as before."""
    engine, backend = faulty_engine(tiny)
    expected = [engine.generate([prompt(variant)], GREEDY)[0] for variant in range(10)]
    wait_until(lambda: is_idle(engine))
    backend.fails.add(step)
    backend.gate.clear()
    requests = [engine.submit(prompt(variant), GREEDY) for variant in range(10)]
    backend.gate.set()
    outcomes = results(requests)
    errors = [answer for answer in outcomes if isinstance(answer, torch.OutOfMemoryError)]
    assert 1 <= len(errors) <= (4 if step != "ready" else 10)
    for answer, complete in zip(outcomes, expected, strict=True):
        assert isinstance(answer, torch.OutOfMemoryError) or answer == complete
    assert [engine.generate([prompt(variant)], GREEDY)[0] for variant in range(10)] == expected
    wait_until(lambda: is_idle(engine))


def test_a_failed_prefill_does_not_end_running_answers(tiny):
    engine, backend = faulty_engine(tiny)
    running = iter(engine.submit(prompt(0), LONG))
    first = next(running)
    backend.fails.add("prefill")
    with pytest.raises(torch.OutOfMemoryError):
        list(engine.submit(prompt(1), GREEDY))
    assert [first, *running] == engine.generate([prompt(0)], LONG)[0]


def test_cancelled_guided_answers_and_beams_free_all_their_rows(tiny_lavit):
    engine = Engine(TorchBackend(tiny_lavit.llm, max_rows=8), tiny_lavit.tokenizer)
    guided = replace(LONG, guidance=3.0)
    beams = replace(guided, num_beams=2)

    def leave_early(settings: GenerationSettings, variant: int) -> None:
        request = engine.submit(prompt(variant), settings)
        if settings.num_beams == 1:
            next(iter(request))
        else:
            time.sleep(0.02 * (variant % 3))
        request.cancel()

    for _ in range(6):
        threads = [
            threading.Thread(target=leave_early, args=(guided if variant % 2 else beams, variant))
            for variant in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        wait_until(lambda: is_idle(engine))


def test_should_stop_reaches_requests_that_wait_for_a_row(tiny):
    """They end while others run, and are never prefilled."""
    engine, backend = faulty_engine(tiny, max_rows=1)
    running = iter(engine.submit(prompt(0), LONG))
    next(running)
    n_prefills = len(backend.prefilled)
    left = threading.Event()
    waiting = engine.submit(prompt(1), GREEDY, should_stop=left.is_set)
    wait_until(lambda: engine.n_waiting == 1)
    assert engine.n_running == 1
    left.set()
    with pytest.raises(Stopped):
        list(waiting)
    assert len(list(running)) == 299
    assert len(backend.prefilled) == n_prefills


def test_an_error_in_should_stop_ends_its_own_request(tiny):
    engine, _ = faulty_engine(tiny)

    def fails() -> bool:
        raise OSError("the connection was closed")

    other = engine.submit(prompt(0), GREEDY)
    with pytest.raises(OSError, match="closed"):
        list(engine.submit(prompt(1), GREEDY, should_stop=fails))
    assert list(other) == engine.generate([prompt(0)], GREEDY)[0]


def test_a_failing_processor_ends_its_own_request(tiny):
    engine, backend = faulty_engine(tiny)
    expected = engine.generate([prompt(0)], GREEDY)[0]

    def fails(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    backend.gate.clear()
    good = engine.submit(prompt(0), GREEDY)
    bad = engine.submit(prompt(1), LONG)
    bad.processors = []
    backend.gate.set()
    next(iter_of_bad := iter(bad))
    bad.processors.append(fails)
    with pytest.raises(ZeroDivisionError):
        list(iter_of_bad)
    assert list(good) == expected


def test_long_prompts_are_read_in_pieces_beside_running_answers(tiny):
    """Between two pieces each running answer gets a token; alone a prompt is read at once."""
    engine, backend = faulty_engine(tiny)
    expected = engine.generate([prompt(3, length=480)], GREEDY)[0]
    assert backend.prefilled == [481]
    other = Engine(backend := FaultyBackend(tiny.llm, max_rows=4), tiny.tokenizer)
    running = iter(other.submit(prompt(0), LONG))
    next(running)
    n_decoded = len(backend.decoded)
    backend.prefilled.clear()
    assert list(other.submit(prompt(3, length=480), GREEDY)) == expected
    assert backend.prefilled == [PREFILL_BESIDE_DECODING, 481 - PREFILL_BESIDE_DECODING]
    assert len(backend.decoded) > n_decoded
    list(running)


def test_plan_cache_never_exceeds_its_budget():
    mib = 1 << 20
    # 8B in half precision: 0.5 MiB a token, 2,048 of them.
    assert plan_cache(mib // 2, 2048, 16384 * mib, 16) == CacheSize(15, 2049)
    assert plan_cache(mib // 2, 2048, 65536 * mib, 16) == CacheSize(16, 2049)
    assert plan_cache(mib // 2, 2048, 512 * mib, 16) == CacheSize(1, 1024)
    with pytest.raises(
        ConfigError, match="KV cache needs 0.0312 GiB at least, but 0.00977 GiB are free"
    ):
        plan_cache(mib // 2, 2048, 10 * mib, 16)
    for budget in (100, 700, 2000, 4097, 9000):
        size = plan_cache(mib, 2000, budget * mib, 3)
        assert size.rows * size.length <= budget


def test_a_small_cache_shortens_the_context_and_refuses_longer_prompts(tiny):
    config = tiny.llm.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    backend = TorchBackend(tiny.llm, cache_bytes=per_token * 101)
    engine = Engine(backend, tiny.tokenizer)
    assert (engine.n_rows, engine.capacity) == (1, 100)
    assert len(engine.generate([prompt(0, length=49)], LONG)[0]) == 50
    with pytest.raises(
        GenerationError, match="has 120 tokens, but 100 fit into the KV cache.*--kv-cache"
    ):
        engine.submit(prompt(0, length=119), GREEDY)


def test_a_dropped_engine_is_freed_with_its_thread(tiny):
    engine, backend = faulty_engine(tiny)
    engine.generate([prompt(0)], GREEDY)
    (thread,) = engine._threads
    reference = weakref.ref(backend)
    del engine, backend
    gc.collect()
    thread.join(10)
    gc.collect()
    assert not thread.is_alive() and reference() is None


WAITING_THREAD = """
import sys, threading
sys.path[:0] = {path!r}
from pathlib import Path
from seed_multimodal.models.seed.pipeline import SeedLlama
from seed_multimodal.inference.prompt import GenerationSettings, Prompt

system = SeedLlama.from_pretrained({folder!r}, device="cpu", log=None)
settings = GenerationSettings(max_new_tokens=200, min_new_tokens=200, do_sample=False)
answer = lambda: print(len(system.generate([Prompt([1, 5, 9])], settings)[0]))
threading.Thread(target=answer).start()
raise SystemExit(3)
"""


@pytest.mark.process
def test_a_program_ends_after_the_answer_that_a_thread_waits_for(tiny_folder):
    """Also if its main thread has raised before."""
    code = WAITING_THREAD.format(path=[path for path in sys.path if path], folder=str(tiny_folder))
    run = run_process([sys.executable, "-c", code], timeout=120)
    assert (run.returncode, run.stdout.strip()) == (3, "200"), run.stderr


COMPUTING_AT_EXIT = (
    WAITING_THREAD.replace("200", "400")
    .replace("threading.Thread(", "threading.Thread(daemon=True, ")
    .replace("raise SystemExit(3)", "import time; time.sleep(0.3); raise SystemExit(3)")
)


@pytest.mark.process
def test_a_program_ends_while_the_engine_computes(tiny_folder):
    """Python aborts if a daemon thread is inside a kernel at the end: the engine stops before."""
    code = COMPUTING_AT_EXIT.format(
        path=[path for path in sys.path if path], folder=str(tiny_folder)
    )
    for _ in range(3):
        run = run_process([sys.executable, "-c", code], timeout=120)
        assert run.returncode == 3, run.stderr
