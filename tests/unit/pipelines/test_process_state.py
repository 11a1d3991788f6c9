"""What belongs to the whole process stays as it is: other threads' layers, torch's defaults and
generators, and functions of libraries."""

import sys

import pytest
from llm_runs import environment
from real_processes import run_checked, run_process
from repository import FOX, ROOT
from warm_processes import PYTHON

# Eight threads use three systems for the first time, which are loaded before or by them, while a
# ninth builds layers.
FIRST_USE = """
import sys, threading
import torch
from torch import nn
from seed_multimodal import MultimodalSystem

wrong, systems, done = [], {}, threading.Event()


def state():
    names = [name for name in dir(nn.init) if name.endswith("_")]
    functions = [getattr(nn.init, name) for name in names]
    return [nn.Module.register_parameter, torch.linspace, torch.get_default_dtype(), *functions]

def load(name):
    systems[name] = MultimodalSystem.from_pretrained(f"pretrained/{name}", log=None)

def use(name, task):
    barrier.wait()
    try:
        if name not in systems:
            load(name)
        system = systems[name]
        if task == "draw":
            system.draw("a fox")
        elif task == "describe":
            assert "fox" in system.describe(sys.argv[2])
        else:
            system.images.encode([sys.argv[2]])
    except BaseException as error:
        wrong.append(f"{name} {task}: {error!r}")

def build_layers():
    torch.manual_seed(1)
    expected = torch.Generator().manual_seed(1)
    while not done.wait(2e-4):
        if state() != before:
            wrong.append("a function or default is replaced")
        layer = nn.Linear(3, 3)
        bound = 3**-0.5
        values = torch.empty(12).uniform_(-bound, bound, generator=expected)
        if not torch.equal(torch.cat([layer.weight.flatten(), layer.bias]), values):
            wrong.append(f"another layer: {layer.weight} {layer.bias}")
            expected = torch.Generator().set_state(torch.get_rng_state())

before = state()
names = ("nano", "nano-x", "nano-lavit")
if sys.argv[1] == "loaded":
    for name in names:
        load(name)
work = [(name, task) for task in ("draw", "describe", "encode") for name in names][:8]
barrier = threading.Barrier(len(work))
builder = threading.Thread(target=build_layers)
threads = [threading.Thread(target=use, args=pair) for pair in work]
for thread in (builder, *threads):
    thread.start()
for thread in threads:
    thread.join()
done.set()
builder.join()
print("; ".join(wrong[:5]) or "right")
"""

# Each torch default is set between two calls, and before a system is loaded.
DEFAULTS = """
import sys
from pathlib import Path
import torch
from seed_multimodal import MultimodalSystem

image = Path(sys.argv[1])

def results(system):
    system.engine.forget()  # other passes of the model round otherwise
    question = [{"role": "user", "content": [image, "What is it?"]}]
    codes = system.images.encode([image])
    drawing, copied = system.draw("a fox", seed=1), system.reconstruct([image], seed=1)[0]
    edited = system.edit(image, "Put it at night.", seed=1).tobytes()
    texts = system.describe(image), system.describe(image, num_beams=2), system.chat(question).text
    return [*texts, edited, drawing.tobytes(), copied.tobytes(), *codes[0].flatten().tolist()]

for name in ("nano", "nano-x", "nano-lavit"):
    def load():
        return MultimodalSystem.from_pretrained(f"pretrained/{name}", log=None)

    before = load()
    expected = results(before)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        torch.set_default_dtype(dtype)
        for system in (before, load()):
            for index, result in enumerate(results(system)):
                assert result == expected[index], f"{name} {dtype}: {index}"
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    for system in (before, load()):
        assert results(system) == expected, name
    torch.set_default_device("cpu")
"""


def run(python, program, *arguments):
    command = [python, "-c", program, *arguments]
    done = run_checked(command, env=environment(), cwd=ROOT)
    return done.stdout.strip()


@pytest.mark.process
@pytest.mark.slow
def test_first_use_in_threads():
    # A server of several models, or a pool of threads, beside a program that builds networks.
    assert run(sys.executable, FIRST_USE, "unloaded", str(FOX)) == "right"


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.timeout(3600)
def test_first_use_in_threads_is_right_each_time():
    ways = ("loaded", "unloaded") * 10
    rounds = [run(sys.executable, FIRST_USE, systems, str(FOX)) for systems in ways]
    assert rounds == ["right"] * 20


@pytest.mark.process
@pytest.mark.slow
def test_defaults_of_torch_change_nothing():
    run(PYTHON, DEFAULTS, str(FOX))


@pytest.mark.nightly
@pytest.mark.process
def test_errors_of_a_library_are_no_damaged_files():
    # Under -OO transformers cannot be imported: its decorators read docstrings.
    command = [sys.executable, "-OO", "-m", "seed_multimodal", "describe", str(FOX)]
    result = run_process([*command, "--model", "nano"], env=environment(), cwd=ROOT)
    assert result.returncode == 0 or "docstring" in result.stderr
    assert "download" not in result.stderr
