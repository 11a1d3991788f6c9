"""The programs in `scripts/` with SEED-LLaMA's original names: an image drawn again, and the three demonstrations.

Without flags they repeat the originals with their weights. Other models get the same requests through their own tasks
(ask, draw, edit), because they were tuned on other sentences.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seed_multimodal.cli.common import (
    Outputs,
    add_common,
    add_out,
    cat_image,
    load_images,
    load_system,
    save_image,
)
from seed_multimodal.entry import DONE, SOME_FAILED, add_quantization, log_line, run_program
from seed_multimodal.language.answer import BrokenImagePart, TextPart
from seed_multimodal.language.tasks import DEMO_QUESTIONS

QUESTION, DRAWING, EDITING = DEMO_QUESTIONS
DRAWING_WORDS = "a dog on the green grass"


def tokenizer_script(argv: Sequence[str] | None = None) -> int:
    """`scripts/seed_tokenizer_inference.py`: image → 32 codes → image."""
    parser = _parser("seed_tokenizer_inference.py", "An image becomes 32 codes and an image again.", "cat.jpg")
    return run_program(parser, _round_trip, argv)


def llama_script(size: str, argv: Sequence[str] | None = None) -> int:
    """`scripts/seed_llama_inference_{8B,14B}.py`: a question about an image, a drawing, an edit.

    Args:
        size: "8b" or "14b": the meaning of `--model released`.
    """
    parser = _parser(f"seed_llama_inference_{size.upper()}.py",
                     f"SEED-LLaMA {size.upper()} answers a question about an image, draws, and edits.", ".")
    return run_program(parser, lambda args: _demonstrate(args, size), argv)


def _parser(program: str, text: str, out: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=text)
    parser.add_argument("--image", metavar="IMAGE", help="default: images/cat.jpg")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this instead (about --image, if one is given)")
    add_out(parser, out)
    add_common(parser, model="released", debug=False)
    add_quantization(parser)
    return parser


def _round_trip(args: argparse.Namespace) -> int:
    outputs = Outputs(args.out)
    codec = load_images(args)
    codec.check_drawing()
    codes = codec.encode([Path(args.image or cat_image())])
    print(" ".join(map(str, codes[0].tolist())))
    print(save_image(codec.draw(codes, seeds=[args.seed])[0], outputs.next("cat", ".jpg")))
    if args.prompt:
        print(load_system(args).ask(codes[0].tolist(), args.prompt, seed=args.seed))
    return DONE


def _demonstrate(args: argparse.Namespace, size: str) -> int:
    one = bool(args.prompt or args.image)
    outputs = Outputs(args.out, 1 if one else 2)
    args.model = size if args.model == "released" else args.model
    system = load_system(args)
    if one:
        content = [*([Path(args.image)] if args.image else []), args.prompt or QUESTION]
        _answer(system, content, args.seed, outputs, "answer")
        return DONE
    cat = cat_image()
    if not system.config.original:
        print(system.ask(cat, QUESTION, seed=args.seed))
        print(save_image(system.draw(DRAWING_WORDS, seed=args.seed), outputs.next("dog", ".jpg")))
        print(save_image(system.edit(cat, EDITING, seed=args.seed), outputs.next("cat_sunglasses", ".jpg")))
        return DONE
    _answer(system, [cat, QUESTION], args.seed, outputs, "answer")
    drawn = [_answer(system, content, args.seed, outputs, name)
             for content, name in (([DRAWING], "dog"), ([cat, EDITING], "cat_sunglasses"))]
    return DONE if all(drawn) else SOME_FAILED


def _answer(system: Any, content: list[Any], seed: int, outputs: Outputs, name: str) -> int:
    """One request: print its texts in order, save its images; returns how many there are."""
    answer = system.chat([{"role": "user", "content": content}], seed=seed)
    images = iter(answer.images)
    for part in answer.parts:
        if isinstance(part, TextPart):
            print(part.text)
        elif isinstance(part, BrokenImagePart):
            log_line(f"an image of this answer is broken: {part.reason}")
        else:
            print(save_image(next(images), outputs.next(name, ".jpg")))
    if name != "answer" and not answer.images:
        log_line(f"the answer to {content[-1]!r} holds no image: try another --seed.")
    return len(answer.images)
