"""Measure a system's answers in chat: descriptions in many phrasings, questions, small talk.

    python -m seed_nano.report.chat --model pretrained/nano --scenes 20

Each request comes with each of the first `--scenes` scenes of the split `val`; a description is
right if it names every label. Small talk comes without an image, so LaVIT, which answers about
images only, has none. *ends*: share of the answers after which the model wrote the end token
(LaVIT's answers are cut before it, at the first full stop).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from PIL import Image

from seed_multimodal.entry import (
    DONE,
    add_device,
    add_language_model,
    bounded_int,
    log_line,
    run_program,
)
from seed_multimodal.language.answer import Answer
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_nano.report.scoring import caption_labels, same_answer, true_labels
from seed_nano.report.write import table
from seed_nano.world.dialogues import DESCRIBE_REQUESTS, UNKNOWN
from seed_nano.world.scene import Scene, render
from seed_nano.world.splits import scenes as listed
from seed_nano.world.tasks import ask_any
from seed_nano.world.things import VOCABULARY
from seed_nano.world.words import normalise

SIDE = 64  # of images in pixels, where the system names none
CONCURRENT = 16  # chats at a time
REQUESTS = (
    "Describe the picture.",
    "Describe the image.",
    "What do you see?",
    "Tell me what you see.",
    "What does the picture show?",
    "Write a caption for the image.",
    # The others are in no training record.
    "Please describe this picture.",
    "What does this image show?",
    "Can you describe the image?",
    "Give a short description of the picture.",
    "Tell me about this picture.",
    "Describe it, please.",
)


@dataclass(frozen=True)
class Chat:
    """One message to a system, and the check of the answer's text."""

    content: Sequence[Any]
    is_right: Callable[[str], bool]


@dataclass(frozen=True)
class Row:
    """A line of the table: shares of the answers to `n` messages."""

    name: str
    right: float
    ends: float
    n: int


def measure(system: MultimodalSystem, n_scenes: int) -> list[Row]:
    """The rows of all phrasings, their mean, questions and small talk."""
    side = system.config.image_size or SIDE
    scenes = listed("val")[:n_scenes]
    pairs = [(scene, Image.fromarray(render(scene, side))) for scene in scenes]
    # 1. Each phrasing of a description request, about every scene.
    requests = {
        request: [Chat([image, request], _describes(scene)) for scene, image in pairs]
        for request in REQUESTS
    }
    rows = [measured(system, _name(request), chats) for request, chats in requests.items()]
    rows.append(
        Row(
            "all requests",
            fmean([row.right for row in rows]),
            fmean([row.ends for row in rows]),
            sum(row.n for row in rows),
        )
    )
    # 2. Questions about the same scenes.
    rows.append(measured(system, "questions", list(_questions(pairs))))
    # 3. Messages without an image.
    if system.config.system != "lavit":
        rows.append(measured(system, "small talk", list(_small_talk())))
        unanswerable = [Chat([request], _says(UNKNOWN)) for request in VOCABULARY["unanswerable"]]
        rows.append(measured(system, "what it cannot answer", unanswerable))
    return rows


def measured(system: MultimodalSystem, name: str, chats: Sequence[Chat]) -> Row:
    """The row of some messages, which the engine answers in batches."""

    def answer(chat: Chat) -> Answer:
        reply: Answer = system.chat([{"role": "user", "content": chat.content}])
        return reply

    with ThreadPoolExecutor(CONCURRENT) as pool:
        answers = list(pool.map(answer, chats))
    right = [chat.is_right(reply.text) for chat, reply in zip(chats, answers, strict=True)]
    ends = [list(reply.ids[-1:]) == [system.tokenizer.eos_token_id] for reply in answers]
    return Row(name, fmean(right), fmean(ends), len(chats))


def _name(request: str) -> str:
    return request if request in DESCRIBE_REQUESTS else f"{request} (not trained)"


def _describes(scene: Scene) -> Callable[[str], bool]:
    [labels] = true_labels([scene])
    return lambda text: caption_labels(text) == labels


def _questions(pairs: Sequence[tuple[Scene, Image.Image]]) -> Iterator[Chat]:
    for index, (scene, image) in enumerate(pairs):
        question = ask_any(scene, random.Random(index))
        yield Chat([image, question.question], _answers(question.answer))


def _answers(truth: str) -> Callable[[str], bool]:
    return lambda text: same_answer(text, truth)


def _small_talk() -> Iterator[Chat]:
    for talk in VOCABULARY["small_talk"]:
        for request in talk["asked"]:
            yield Chat([request], _says(talk["answer"]))


def _says(answer: str) -> Callable[[str], bool]:
    return lambda text: normalise(text) == normalise(answer)


def run(options: argparse.Namespace) -> int:
    """The command."""
    system = MultimodalSystem.from_pretrained(
        options.model,
        device=options.device,
        dtype=options.dtype,
        quantization=options.quantization,
        compiled=options.compiled,
        load_decoder=False,
        log=log_line,
    )
    rows = measure(system, options.scenes)
    cells = [(row.name, f"{row.right:.3f}", f"{row.ends:.3f}", str(row.n)) for row in rows]
    print(table((f"{system.config.name}, in chat", "right", "ends", "n"), cells))
    return DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m seed_nano.report.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="pretrained/nano", help="folder of the system")
    parser.add_argument(
        "--scenes", type=bounded_int(1), default=20, help="scenes of each request (%(default)s)"
    )
    add_device(parser)
    add_language_model(parser)
    return run_program(parser, run, arguments, "chat report")


if __name__ == "__main__":
    raise SystemExit(main())
