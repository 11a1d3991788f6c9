"""Time answers in text: CPU-seconds and generated tokens of a question and a description.

    OMP_NUM_THREADS=1 python benchmarks/answers.py --device cpu --model pretrained/nano-x

`describe`, then `ask` with short questions; each call has an image of its own. An answer costs as
much as its tokens, so a question should cost at most 2.5 times a description (`times_describe`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from shared import base_parser, input_images, load_system, print_line, rounded, start

from seed_multimodal.device import choose_device
from seed_multimodal.pipelines.base import MultimodalSystem

QUESTIONS = (
    "What is on the left?",
    "How many things are there?",
    "What is the background?",
    "Is there a dog?",
    "Where is the cat?",
)


class CountedTokens:
    """Counts the tokens that a system's engine generates."""

    def __init__(self, system: MultimodalSystem) -> None:
        self.count = 0
        self._generate = system.engine.generate
        system.engine.generate = self  # type: ignore[assignment]

    def __call__(self, *arguments: Any, **options: Any) -> list[list[int]]:
        answers = self._generate(*arguments, **options)
        self.count += sum(map(len, answers))
        return answers


def measure(answer: Callable[[int], str], repeats: int, tokens: CountedTokens) -> dict[str, Any]:
    """Median CPU-seconds of one answer, and mean generated tokens."""
    answer(0)  # warm-up
    tokens.count = 0
    seconds = []
    for index in range(1, repeats + 1):
        begin = time.process_time()
        answer(index)
        seconds.append(time.process_time() - begin)
    return {
        "cpu_seconds": rounded(statistics.median(seconds)),
        "tokens": rounded(tokens.count / repeats),
    }


def run(options: argparse.Namespace) -> None:
    runtime = choose_device(options.device, options.dtype, log=None)
    system = load_system(options, load_decoder=False)
    # Every call gets an image of its own: a repeated one would come from the cache.
    images: Sequence[Image.Image] = input_images(2 * options.repeats + 2)
    tokens = CountedTokens(system)
    tasks: dict[str, Callable[[int], str]] = {
        "describe": lambda index: system.describe(images[index]),
        "ask": lambda index: system.ask(images[-index - 1], QUESTIONS[index % len(QUESTIONS)]),
    }
    seconds: dict[str, float] = {}
    for task, answer in tasks.items():
        results = measure(answer, options.repeats, tokens)
        seconds[task] = results["cpu_seconds"]
        results["times_describe"] = round(seconds[task] / seconds["describe"], 2)
        print_line(
            "answers",
            options,
            runtime,
            {"variant": task, "repeats": options.repeats},
            results,
        )


if __name__ == "__main__":
    parser = base_parser(__doc__)
    parser.add_argument(
        "--repeats", type=int, default=5, help="answers of each kind; the median is printed"
    )
    start(run, parser)
