"""What callers see when something fails, leaves or waits: no other request loses its answer, and no
row of the cache is lost; threads in programs that fork, and whose main part ends."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from llm_runs import environment
from real_processes import run_process
from repository import ROOT
from waiting import wait_until
from warm_processes import PYTHON

from seed_multimodal.errors import ConfigError, GenerationError
from seed_multimodal.inference.backends.base import NextTokens, PromptChunk
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.base_engine import GeneratedSequence
from seed_multimodal.inference.engine import PREFILL_BESIDE_DECODING, Engine
from seed_multimodal.inference.prompt import GenerationSettings, Prompt, Stopped

GREEDY = GenerationSettings(max_new_tokens=20, do_sample=False, constrain=False)
LONG = replace(GREEDY, max_new_tokens=300, min_new_tokens=300)
GUIDED = replace(GREEDY, guidance=2.0, min_new_tokens=20)


class FaultyBackend(TorchBackend):
    """Waits for `gate` before a pass, and once runs out of memory in the step `fails`.

    on_decode: called once, with the scores of the next decoding pass.
    """

    def __init__(self, llm, **options):
        super().__init__(llm, **options)
        self.fails = ""
        self.on_decode: Callable[[torch.Tensor], object] | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.passes: list[int] = []  # prompt tokens; 0: a decoding pass

    def _check(self, step: str):
        if self.fails == step:
            self.fails = ""
            raise torch.OutOfMemoryError(f"CUDA out of memory in {step}")

    @contextmanager
    def ready(self) -> Iterator[None]:
        self.gate.wait(30)
        self._check("ready")
        with super().ready():
            yield

    def prefill(self, chunks: Sequence[PromptChunk]) -> NextTokens:
        self.gate.wait(30)
        self._check("prefill")
        self.passes.append(sum(chunk.stop - chunk.start for chunk in chunks))
        return super().prefill(chunks)

    def decode(self, tokens: Sequence[int], slots: Sequence[int], *position_ids) -> NextTokens:
        computed = super().decode(tokens, slots, *position_ids)
        self.passes.append(0)
        self._check("decode")  # when keys and values are written
        on_decode, self.on_decode = self.on_decode, None
        if on_decode is not None:
            on_decode(computed.scores)
        return computed

    def swap(self, row_a: int, row_b: int, length_a: int, length_b: int):
        self._check("swap")
        super().swap(row_a, row_b, length_a, length_b)

    def copy(self, source: int, target: int, length):
        if self.fails == "copy":
            self.clear(target)  # a failed copy has begun
        self._check("copy")
        super().copy(source, target, length)


def faulty_engine(system, max_rows: int = 4) -> tuple[Engine, FaultyBackend]:
    backend = FaultyBackend(system.llm, max_rows=max_rows)
    return Engine(backend, system.tokenizer), backend


def ids_of(variant: int, length=6) -> list[int]:
    return [1, *(3 + (variant * 7 + index) % 290 for index in range(length))]


def prompt(variant: int, length=6) -> Prompt:
    return Prompt(ids_of(variant, length), negative=ids_of(variant + 1, length))


def outcome(request: GeneratedSequence):
    """The tokens of a request, or its error."""
    try:
        return list(request)
    except Exception as error:  # noqa: BLE001 whatever the engine delivered
        return error


def wait_until_idle(engine: Engine):
    wait_until(lambda: (engine.n_decoding, engine.reading, engine.n_waiting) == (0, [], 0))


@pytest.mark.parametrize("settings", [GREEDY, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("step", ["ready", "prefill", "decode", "swap", "copy"])
def test_out_of_memory_ends_the_requests_of_the_step_and_no_later_ones(tiny, step, settings):
    engine, backend = faulty_engine(tiny)
    start = ids_of(0, 40)  # of every second prompt, so that rows are copied
    asked = [Prompt([*(start if n % 2 else []), *ids_of(n)]) for n in range(10)]
    settings = replace(settings, min_new_tokens=0)
    expected = [engine.generate([one], settings)[0] for one in asked]
    wait_until_idle(engine)
    backend.gate.clear()
    backend.fails = step
    requests = [engine.submit(one, settings) for one in asked]
    backend.gate.set()
    outcomes = [outcome(request) for request in requests]

    errors = [answer for answer in outcomes if isinstance(answer, torch.OutOfMemoryError)]
    assert 1 <= len(errors) <= (4 if step in ("prefill", "decode") else 10)
    for answer, complete in zip(outcomes, expected, strict=True):
        assert isinstance(answer, torch.OutOfMemoryError) or answer == complete
    # Every row answers as before: none is lost, and none claims what it does not hold.
    assert engine.generate(asked, settings) == expected
    wait_until_idle(engine)


def test_a_failed_prefill_does_not_end_running_answers(tiny):
    # A prompt that is too long for the memory is another user's.
    engine, backend = faulty_engine(tiny)
    running = iter(engine.submit(prompt(0), LONG))
    first = next(running)
    backend.fails = "prefill"
    with pytest.raises(torch.OutOfMemoryError):
        list(engine.submit(prompt(1), GREEDY))
    assert [first, *running] == engine.generate([prompt(0)], LONG)[0]


@pytest.mark.parametrize("row", [0, 1], ids=["conditional", "unconditional"])
def test_nan_ends_its_request_and_leaves_nothing_to_the_next(tiny, row):
    engine, backend = faulty_engine(tiny, 2)
    expected = engine.generate([prompt(1)], GUIDED)
    backend.on_decode = lambda scores: scores[row].fill_(float("nan"))
    with pytest.raises(GenerationError):
        engine.generate([prompt(1)], GUIDED)
    assert engine.generate([prompt(1)], GUIDED) == expected


NO_END = replace(GREEDY, stop_token_ids=(1 << 20,), min_new_tokens=2)
BAD_REQUESTS = {
    "an end token outside of the vocabulary": (Prompt([5] * 6), NO_END, IndexError),
    "an empty prompt": (Prompt(), GREEDY, GenerationError),
    "a prompt beyond the context": (Prompt([5] * 600), GREEDY, GenerationError),
    "more beams than rows": (Prompt([5]), replace(GREEDY, num_beams=3), GenerationError),
    "beams with guidance": (Prompt([5]), replace(GUIDED, num_beams=2), ConfigError),
    "an id outside the vocabulary": (Prompt([10**6]), GREEDY, IndexError),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_ends_alone(tiny, name):
    # Else one user's mistake would end the answers of all.
    bad, settings, error = BAD_REQUESTS[name]
    engine, _ = faulty_engine(tiny, 2)
    expected = engine.generate([prompt(0)], GREEDY)[0]
    parallel = engine.submit(prompt(0), GREEDY)
    with pytest.raises(error):
        list(engine.submit(bad, settings))
    assert list(parallel) == expected
    for _ in range(3):  # in every row, also the bad one's
        assert engine.generate([prompt(0)] * 2, GREEDY) == [expected] * 2


def test_a_small_cache_shortens_the_context_and_refuses_longer_prompts(tiny):
    # The error names the flag that would give it room.
    config = tiny.llm.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    engine = Engine(TorchBackend(tiny.llm, cache_bytes=per_token * 101), tiny.tokenizer)
    assert len(engine.generate([prompt(0, length=49)], LONG)[0]) == 50
    with pytest.raises(GenerationError, match="--kv-cache"):
        engine.submit(prompt(0, length=119), GREEDY)


# ---- callers that leave


@pytest.mark.parametrize("waits", [False, True], ids=["running", "waiting"])
def test_should_stop_ends_its_own_request(tiny, waits):
    # A caller who left must not be answered, nor end the answers of others.
    engine, backend = faulty_engine(tiny, max_rows=1 if waits else 2)
    expected = engine.generate([prompt(0)], LONG)[0]
    running = iter(engine.submit(prompt(0), LONG))
    first = next(running)
    n_prefills = sum(map(bool, backend.passes))
    with pytest.raises(Stopped):
        list(engine.submit(prompt(1), replace(LONG, should_stop=lambda: True)))
    assert [first, *running] == expected
    if waits:  # it never got a row
        assert sum(map(bool, backend.passes)) == n_prefills


def test_long_prompts_are_read_in_pieces_beside_running_answers(tiny):
    # A long prompt would otherwise stop all streams while it is read.
    engine, backend = faulty_engine(tiny)
    long = prompt(3, length=480)
    expected = engine.generate([long], GREEDY)[0]
    assert backend.passes[0] == 481  # alone, at once
    engine, backend = faulty_engine(tiny)
    running = iter(engine.submit(prompt(0), LONG))
    next(running)
    backend.passes.clear()
    assert list(engine.submit(long, GREEDY)) == expected
    pieces = [index for index, n_tokens in enumerate(backend.passes) if n_tokens]
    sizes = [backend.passes[index] for index in pieces]
    assert sum(sizes) == 481 and max(sizes) <= PREFILL_BESIDE_DECODING
    # Between two pieces the running answer gets a token.
    assert all(after - before > 1 for before, after in zip(pieces, pieces[1:], strict=False))
    running.close()


# ---- engines and programs that end


@pytest.mark.slow
def test_a_dropped_engine_answers_and_is_freed_with_its_thread(tiny):
    # Programs that open one system after another would keep each one's weights in memory.
    expected = faulty_engine(tiny)[0].generate([prompt(0)], GREEDY)[0]
    for _ in range(2):
        before = set(threading.enumerate())
        engine, backend = faulty_engine(tiny)
        request = engine.submit(prompt(0), GREEDY)
        [thread] = set(threading.enumerate()) - before
        reference = weakref.ref(backend)
        del engine, backend
        assert list(request) == expected
        gc.collect()
        thread.join(10)
        gc.collect()
        assert not thread.is_alive() and reference() is None


PROGRAM = """
import sys, threading, time
from seed_multimodal import MultimodalSystem
from seed_multimodal.inference.prompt import GenerationSettings, Prompt

system = MultimodalSystem.from_pretrained(sys.argv[1], device="cpu", log=None)
settings = GenerationSettings(max_new_tokens=400, min_new_tokens=400, do_sample=False)
answer = lambda: print(len(system.engine.generate([Prompt([1, 5, 9])], settings)[0]))
threading.Thread(target=answer, daemon=sys.argv[2] == "daemon").start()
time.sleep(0.1)
raise SystemExit(3)
"""


@pytest.mark.process
@pytest.mark.parametrize("kind, printed", [("thread", "400"), ("daemon", "")])
def test_a_program_ends_after_the_answer_that_a_thread_waits_for(tiny_folder, kind, printed):
    """Python aborts if a daemon thread computes at the end: the engine stops before."""
    command = [PYTHON, "-c", PROGRAM, str(tiny_folder), kind]
    run = run_process(command, timeout=120)
    assert (run.returncode, run.stdout.strip()) == (3, printed), run.stderr


START = """
import multiprocessing, sys, threading, time
import torch
from seed_multimodal import MultimodalSystem

torch.set_num_threads(2)

system = MultimodalSystem.from_pretrained("nano", device="cpu", log=None)
FOX = "images/fox.png"
USES = {
    "describe": lambda: system.describe(FOX),
    "text": lambda: system.chat([{"role": "user", "content": "Hello"}]).text,
    "draw": lambda: system.draw("a fox", seed=1).tobytes(),
}
use = lambda: [answer() for answer in USES.values()]
"""
FORK = """
expected = use()
context = multiprocessing.get_context("fork")

def answer(queue):
    answers = [use()]
    thread = threading.Thread(target=lambda: answers.append(use()))
    thread.start()
    thread.join()
    queue.put(answers)

for _ in range(2):
    queue = context.Queue()
    child = context.Process(target=answer, args=(queue,), daemon=True)
    child.start()
    assert queue.get(timeout=60) == [expected] * 2
assert use() == expected
print("equal")
"""
# As from Python 3.12 on, no thread starts once the main one has ended.
AFTER_MAIN = """
expected = use()

def answer():
    time.sleep(0.5)
    answers = [use(), use()]
    print("equal" if answers == [expected] * 2 else "different")

def refuse(thread):
    raise RuntimeError("can't create new thread at interpreter shutdown")

threading.Thread(target=answer).start()
threading.Thread.start = refuse
"""
# Without a thread that the main program's use has started.
FIRST_AFTER_MAIN = (
    AFTER_MAIN.replace("use()", "", 1)
    .replace("expected = ", "")
    .replace("answers == [expected] * 2", "answers[0] == answers[1]")
)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(
    "program", [FORK, AFTER_MAIN, FIRST_AFTER_MAIN], ids=["fork", "after main", "first after main"]
)
def test_answers_in_forked_children_and_after_the_end_of_main(program):
    # gunicorn --preload and multiprocessing fork; Python waits for threads that outlive main.
    command = [PYTHON, "-c", START + program]
    run = run_process(command, timeout=120, cwd=ROOT, env=environment())
    assert (run.returncode, run.stdout.strip()) == (0, "equal"), run.stderr
