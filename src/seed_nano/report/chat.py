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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean

from PIL import Image

from seed_multimodal.cli.common import add_flags, load_system, program_parser
from seed_multimodal.entry import DONE, add_device, bounded_int, run_program
from seed_multimodal.language.answer import Answer
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_nano.report.scoring import caption_labels, same_answer
from seed_nano.report.write import table
from seed_nano.world.dialogues import DESCRIBE_REQUESTS, UNKNOWN
from seed_nano.world.scene import scene_image
from seed_nano.world.splits import scenes as listed
from seed_nano.world.tasks import ask_any
from seed_nano.world.things import VOCABULARY
from seed_nano.world.words import describe, normalise

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
Chat = tuple[Sequence[str | Image.Image], str]  # a message, and the right answer
Row = tuple[str, float, float, int]  # name; shares of right and ended answers; their number


def measure(system: MultimodalSystem, n_scenes: int) -> list[Row]:
    """The rows of all phrasings, their mean, questions and small talk."""
    side = system.config.image_size or SIDE
    scenes = [(scene, scene_image(scene, side)) for scene in listed("val")[:n_scenes]]
    # 1. Each phrasing of a description request, about every scene.
    rows = []
    for request in REQUESTS:
        name = request if request in DESCRIBE_REQUESTS else f"{request} (not trained)"
        chats: list[Chat] = [([image, request], describe(scene)) for scene, image in scenes]
        rows.append(measured(system, name, chats, _same_labels))
    _, right, ends, counts = zip(*rows, strict=True)
    rows.append(("all requests", fmean(right), fmean(ends), sum(counts)))

    # 2. Questions about the same scenes.
    chats = []
    for index, (scene, image) in enumerate(scenes):
        question = ask_any(scene, random.Random(index))
        chats.append(([image, question.question], question.answer))
    rows.append(measured(system, "questions", chats, same_answer))

    # 3. Messages without an image.
    if system.abilities.converses:
        chats = []
        for talk in VOCABULARY["small_talk"]:
            chats += [([request], talk["answer"]) for request in talk["asked"]]
        rows.append(measured(system, "small talk", chats, _same_text))
        chats = [([request], UNKNOWN) for request in VOCABULARY["unanswerable"]]
        rows.append(measured(system, "what it cannot answer", chats, _same_text))
    return rows


def measured(
    system: MultimodalSystem,
    name: str,
    chats: Sequence[Chat],
    is_right: Callable[[str, str], bool],
) -> Row:
    """The row of some messages, which the engine answers in batches.

    is_right: compares the text of an answer with the right one.
    """

    def answer(chat: Chat) -> Answer:
        reply: Answer = system.chat([{"role": "user", "content": chat[0]}])
        return reply

    # The engine batches the requests of several threads.
    with ThreadPoolExecutor(CONCURRENT) as pool:
        answers = list(pool.map(answer, chats))
    right = [is_right(reply.text, truth) for reply, (_, truth) in zip(answers, chats, strict=True)]
    ends = [list(reply.ids[-1:]) == [system.tokenizer.eos_token_id] for reply in answers]
    return name, fmean(right), fmean(ends), len(chats)


def _same_labels(text: str, caption: str) -> bool:
    return caption_labels(text) == caption_labels(caption)


def _same_text(text: str, truth: str) -> bool:
    return normalise(text) == normalise(truth)


def run(options: argparse.Namespace) -> int:
    """The command."""
    system = load_system(options, load_decoder=False)
    rows = []
    for name, right, ends, count in measure(system, options.scenes):
        rows.append((name, f"{right:.3f}", f"{ends:.3f}", str(count)))
    print(table((f"{system.config.name}, in chat", "right", "ends", "n"), rows))
    return DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = program_parser("python -m seed_nano.report.chat", __doc__ or "")
    parser.add_argument("--model", default="pretrained/nano", help="folder of the system")
    parser.add_argument(
        "--scenes", type=bounded_int(1), default=20, help="scenes of each request (%(default)s)"
    )
    add_device(parser)
    add_flags(parser, "language model")
    return run_program(parser, run, arguments, "chat report")


if __name__ == "__main__":
    raise SystemExit(main())
