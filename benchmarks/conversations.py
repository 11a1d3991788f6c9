"""Random conversations from many threads against the same ones alone: every answer must be equal.

    python benchmarks/conversations.py --count 1000 --threads 10 --cancelled 0.2

Questions, descriptions, conversations of several turns, sampled, greedy and with beams, with and
without images, streamed or whole; a share of them is cancelled by its caller after a few tokens.
Prints the number of answers that differ, and ends with 1 if any does.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from pathlib import Path
from typing import Any

from shared import ROOT, base_parser, load_system, start

from seed_multimodal.device import limit_threads
from seed_multimodal.errors import SeedError

QUESTIONS = (
    "What is on the left?",
    "What is this?",
    "How many things are there?",
    "Describe the picture.",
    "Is it night?",
)
REPLIES = ("A fox.", "a snowman", "Yes.", "I do not know.")


def question(rng: random.Random, images: list[Path], image_share: float) -> dict[str, Any]:
    """A user's message: a question, in `image_share` of the cases about an image."""
    content = [rng.choice(images)] if rng.random() < image_share else []
    return {"role": "user", "content": [*content, rng.choice(QUESTIONS)]}


def conversation(
    rng: random.Random, images: list[Path], single: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and options of a random conversation; `single`: one message with an image
    (LaVIT)."""
    messages: list[dict[str, Any]] = []
    # Earlier turns.
    for _ in range(0 if single else rng.choice((0, 0, 1, 2))):
        messages.append(question(rng, images, image_share=0.3))
        messages.append({"role": "assistant", "content": rng.choice(REPLIES)})
    # The last message: the question to answer, mostly about a new image.
    messages.append(question(rng, images, image_share=1 if single else 0.7))
    # Half is sampled; a tenth has beams, which take no sampling options.
    options: dict[str, Any] = {"max_new_tokens": rng.choice((5, 20, 60))}
    if rng.random() < 0.5:
        options |= {
            "temperature": rng.choice((0.7, 1.5)),
            "top_p": 0.9,
            "seed": rng.randrange(1000),
        }
    if rng.random() < 0.1:
        options = {
            "max_new_tokens": options["max_new_tokens"],
            "num_beams": 2,
            "do_sample": False,
        }
    if rng.random() < 0.1:
        options["repetition_penalty"] = 1.2
    return messages, options


def answer(
    system: Any, messages: list[dict[str, Any]], options: dict[str, Any], after: int | None = None
) -> Any:
    """The ids of an answer, or the sentence of its error; `after`: cancelled after so many events
    (None then)."""
    try:
        if after is None:
            return list(system.chat(messages, **options).ids)
        events = system.chat(messages, stream=True, **options)
        for _, event in zip(range(after), events, strict=False):
            if event["type"] == "done":
                return list(event["answer"].ids)
        events.close()
        return None
    except SeedError as error:
        return str(error)


def run(options: argparse.Namespace) -> int:
    rng = random.Random(options.seed)
    system = load_system(options, load_decoder=False)
    limit_threads(system.llm, system.images.model)
    images = sorted((ROOT / "images").glob("*.png"))[:6]
    single = type(system).__name__ == "Lavit"
    jobs = [conversation(rng, images, single) for _ in range(options.count)]
    stops = [rng.randrange(1, 4) if rng.random() < options.cancelled else None for _ in jobs]

    # 1. Together: each thread takes the next job; every second whole answer is streamed.
    together: dict[int, Any] = {}
    indices = iter(range(len(jobs)))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                index = next(indices, None)
            if index is None:
                return
            after = stops[index]
            if after is None and index % 2:
                after = 10**9
            together[index] = answer(system, *jobs[index], after)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(options.threads)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(options.seconds)
    hanging = sum(thread.is_alive() for thread in threads)
    seconds = time.monotonic() - started

    # 2. Alone, in a system that has answered nothing else.
    fresh = load_system(options, load_decoder=False)
    compared = differing = 0
    for index, answers in sorted(together.items()):
        if answers is not None:
            compared += 1
            differing += answers != answer(fresh, *jobs[index])
    cancelled = sum(answers is None for answers in together.values())
    print(
        f"{options.model}: {len(jobs)} conversations from {options.threads} threads in "
        f"{seconds:.0f} s; {compared} answers compared, {differing} differ; {cancelled} cancelled; "
        f"{hanging} threads hang; active rows left: {system.engine.n_active}"
    )
    return int(bool(differing or hanging or len(together) < len(jobs)))


if __name__ == "__main__":
    parser = base_parser(__doc__)
    parser.set_defaults(device="cpu")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=10)
    parser.add_argument("--cancelled", type=float, default=0.2)
    parser.add_argument(
        "--seconds", type=int, default=1800, help="after which threads count as hanging"
    )
    parser.add_argument("--seed", type=int, default=0)
    start(run, parser)
