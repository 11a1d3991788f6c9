"""Threads of the engine and of image networks in programs that fork, and whose main part ends."""

import sys

import pytest
from real_processes import run_process
from repository import ROOT

START = """
import multiprocessing, sys, threading, time
from seed_multimodal import MultimodalSystem

system = MultimodalSystem.from_pretrained("nano", device="cpu", log=None)
FOX = "images/fox.png"
USES = {
    "describe": lambda: system.describe(FOX),
    "text": lambda: system.chat([{"role": "user", "content": "Hello"}]).text,
    "draw": lambda: system.draw("a fox", seed=1).tobytes(),
}
use = USES[sys.argv[1]]
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
@pytest.mark.parametrize("use", ["describe", "text", "draw"])
@pytest.mark.parametrize(
    "program", [FORK, AFTER_MAIN, FIRST_AFTER_MAIN], ids=["fork", "after main", "first after main"]
)
def test_answers_in_forked_children_and_after_the_end_of_main(program, use):
    # gunicorn --preload and multiprocessing fork; Python waits for threads that outlive main.
    command = [sys.executable, "-c", START + program, use]
    run = run_process(command, timeout=120, cwd=ROOT, env={"OMP_NUM_THREADS": "2"})
    assert (run.returncode, run.stdout.strip()) == (0, "equal"), run.stderr
