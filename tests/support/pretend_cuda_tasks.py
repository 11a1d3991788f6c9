"""Every task of an embedded system on pretended CUDA devices."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pretend_cuda
import random_images
import torch
from PIL import Image

from seed_multimodal import MultimodalSystem

FOX = Path(__file__).resolve().parents[2] / "images" / "fox_and_snowman.png"
FEW = {"num_inference_steps": 1}
SHORT = {"max_new_tokens": 12}
IMAGE = {"max_new_tokens": 60, **FEW}

THREADS = 8
IN_THREADS = ("describe", "ask", "sampling", "edit", "draw")
BANDWIDTH = 200_000_000  # bytes a second: a move of the language model takes tens of milliseconds
ROUNDS = 4  # of these tasks

Task = Callable[[Any], Any]


def common_tasks() -> dict[str, Task]:
    """Tasks of all three systems."""
    question = "What is on the left?"
    night = [FOX, "Put it at night."]
    return {
        "describe": lambda s: s.describe(FOX),
        "ask": lambda s: s.ask(FOX, question, **SHORT),
        "two images": lambda s: s.ask([[FOX, FOX]], question, **SHORT),
        "sampling": lambda s: s.ask(FOX, question, do_sample=True, seed=3, **SHORT),
        "beams": lambda s: s.describe(FOX, num_beams=2, **SHORT),
        "sampled beams": lambda s: s.describe(FOX, num_beams=2, do_sample=True, seed=1, **SHORT),
        "edit with beams": lambda s: s.edit(FOX, "Put it at night.", num_beams=2, **FEW),
        "draw": lambda s: s.draw("a noto dog left of a tree", **FEW),
        "fast preset": lambda s: s.draw("a noto dog left of a tree", preset="fast", **FEW),
        "size": lambda s: s.draw("a noto dog left of a tree", height=64, width=96, **FEW),
        "edit": lambda s: s.edit(FOX, "Put it at night.", **FEW),
        "forced image": lambda s: (
            s.chat([{"role": "user", "content": night}], force_image=True, **IMAGE).images
        ),
        "stream": stream,
        "reconstruct": lambda s: s.reconstruct(FOX, **FEW),
    }


def stream(system):
    """The kinds of events of a drawing with previews, and its image."""
    request = [{"role": "user", "content": "Please draw a noto dog."}]
    events = list(system.chat(request, stream=True, force_image=True, **IMAGE))
    return [event["type"] for event in events], events[-1]["answer"].images


def own_tasks(family: str) -> dict[str, Task]:
    """Tasks of one family."""
    if family == "seed_x":
        return {"detect": lambda s: s.detect(FOX, "the snowman").text}
    if family == "lavit":
        guided = {"guidance": 4.0, "do_sample": True, "seed": 1, **FEW}
        return {
            "tokenize": lambda s: s.tokenize(FOX),
            "guidance": lambda s: s.draw("a dog", **guided),
            "negative prompt": lambda s: s.draw("a dog", negative_prompt="a cat", **guided),
            "compose": lambda s: s.compose([FOX, "at night"], **FEW),
        }
    return {
        "tokenize": lambda s: s.tokenize(FOX),
        "negative codes": lambda s: s.images.draw(
            s.tokenize(FOX), seeds=[0], negative_codes=list(range(32)), **FEW
        ),
        "first codes": lambda s: s.images.draw(s.tokenize(FOX), seeds=[0], codes=8, **FEW),
    }


def same(value, other) -> bool:
    """Whether two results are equal; images drawn in another batch may differ by rounding."""
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(same, value, other))
    if isinstance(value, torch.Tensor):
        return torch.equal(value, other)
    if isinstance(value, Image.Image):
        return random_images.same(value, other, 2)
    return bool(value == other)


def attempt(system, task: Task) -> tuple[Any, str]:
    """A result and an empty string, or None and the error in one line."""
    try:
        return task(system), ""
    except Exception as error:  # noqa: BLE001  a row of the table
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


def failures_of(name, options: dict, placement: str, expected: dict) -> dict[str, str]:
    """Task → what went wrong with the system at a placement; `expected`: results on the CPU."""
    pretend_cuda.set_bandwidth(BANDWIDTH if "offload" in options else 0)
    system = MultimodalSystem.from_pretrained(name, log=None, **options)
    tasks = common_tasks() | own_tasks(system.config.system)
    names = list(tasks)

    # Weights that move may be used by the thread only that moves them.
    users = set()
    system.llm.get_input_embeddings().register_forward_pre_hook(
        lambda *_: users.add(threading.get_ident())
    )
    if "threads" in placement:
        names = [task for task in names if task in IN_THREADS] * ROUNDS

    # In threads tasks run beside each other.
    with ThreadPoolExecutor(THREADS if "threads" in placement else 1) as pool:
        results = list(pool.map(lambda task: attempt(system, tasks[task]), names))

    failures = {}
    images = system.images
    parts = {"image_device": images.device, "drawing_device": images.drawing_device}
    for part, device in parts.items():
        if str(device) != options.get(part, str(device)) or device.type == "cpu":
            failures[part] = f"{device}"
    for task, (result, error) in zip(names, results, strict=True):
        if error:
            failures[task] = error
        elif "dtype" in options and not same(result, expected[task]):
            failures[task] = "another answer than on the CPU"
    if "offload" in options and len(users) != 1:
        failures["one user"] = f"{len(users)} threads used weights that one of them moves"
    return failures
