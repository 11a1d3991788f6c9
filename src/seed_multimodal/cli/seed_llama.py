"""The programs in `scripts/` with SEED-LLaMA's original names: an image drawn again, and the three demonstrations.

Without flags they repeat the originals with their weights. Other models get the same requests through their own tasks
(ask, draw, edit), because they were tuned on other sentences.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seed_multimodal.cli.common import Outputs, add_common, cat_image, load_images, load_system
from seed_multimodal.entry import DONE, run_program
from seed_multimodal.language.tasks import DEMO_QUESTIONS

QUESTION, DRAWING, EDITING = DEMO_QUESTIONS


def tokenizer_script(argv: Sequence[str] | None = None) -> int:
    """`scripts/seed_tokenizer_inference.py`: image → 32 codes → image."""
    parser = _parser("seed_tokenizer_inference.py", "An image becomes 32 codes and an image again.", "cat.jpg")
    return run_program(parser, _round_trip, argv)


def llama_script(size: str, argv: Sequence[str] | None = None) -> int:
    """`scripts/seed_llama_inference_{8B,14B}.py`; `size`: "8b" or "14b", the meaning of `--model released`."""
    parser = _parser(f"seed_llama_inference_{size.upper()}.py",
                     f"SEED-LLaMA {size.upper()} answers a question about an image, draws, and edits.", ".")
    return run_program(parser, lambda args: _demonstrate(args, size), argv)


def _parser(program: str, text: str, out: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=text)
    parser.add_argument("--image", metavar="IMAGE", help="default: images/cat.jpg")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this instead (about --image, if one is given)")
    add_common(parser, model="released", out=out, language=True)
    return parser


def _round_trip(args: argparse.Namespace) -> int:
    outputs = Outputs(args.out)
    codec = load_images(args)
    codec.check_drawing()
    codes = codec.encode([Path(args.image or cat_image())])
    print(" ".join(map(str, codes[0].tolist())))
    print(outputs.save(codec.draw(codes, seeds=[args.seed])[0], "cat", ".jpg"))
    if args.prompt:
        print(load_system(args).ask(codes[0].tolist(), args.prompt, seed=args.seed))
    return DONE


def _demonstrate(args: argparse.Namespace, size: str) -> int:
    single = bool(args.prompt or args.image)
    outputs = Outputs(args.out, 1 if single else 2)
    args.model = size if args.model == "released" else args.model
    system = load_system(args)
    if single:
        _answer(args, system, [*([Path(args.image)] if args.image else []), args.prompt or QUESTION], outputs, "answer")
    elif system.config.original:
        for content, name in (([cat_image(), QUESTION], "answer"), ([DRAWING], "dog"),
                              ([cat_image(), EDITING], "cat_sunglasses")):
            _answer(args, system, content, outputs, name)
    else:
        print(system.ask(cat_image(), QUESTION, seed=args.seed))
        print(outputs.save(system.draw("a dog on the green grass", seed=args.seed), "dog", ".jpg"))
        print(outputs.save(system.edit(cat_image(), EDITING, seed=args.seed), "cat_sunglasses", ".jpg"))
    return DONE


def _answer(args: argparse.Namespace, system: Any, content: list[Any], outputs: Outputs, name: str) -> None:
    """One request: print the answer's text, save its images."""
    answer = system.chat([{"role": "user", "content": content}], seed=args.seed)
    print(answer.text)
    for image in answer.images:
        print(outputs.save(image, name, ".jpg"))
