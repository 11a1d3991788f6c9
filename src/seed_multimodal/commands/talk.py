"""`seed describe | ask | draw | edit`: one request per picture or text; a bad one is reported and skipped."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from seed_multimodal.commands.common import (
    Outcomes,
    OutputNames,
    drawing_settings,
    each_picture,
    emit,
    generation_settings,
    load_system,
    save_picture,
)

if TYPE_CHECKING:
    from PIL import Image


def describe(args: argparse.Namespace) -> int:
    """Print a caption for each picture."""
    system = load_system(args)

    def one(name: str, image: Image.Image) -> None:
        text = system.describe(image, args.prompt, seed=args.seed, **generation_settings(args))
        emit(args, {"picture": name, "description": text}, f"{name}: {text}")

    return each_picture(args, one)


def ask(args: argparse.Namespace) -> int:
    """Print the answer to one question about each picture."""
    system = load_system(args)

    def one(name: str, image: Image.Image) -> None:
        text = system.ask(image, args.question, seed=args.seed, **generation_settings(args))
        emit(args, {"picture": name, "question": args.question, "answer": text}, f"{name}: {text}")

    return each_picture(args, one)


def draw(args: argparse.Namespace) -> int:
    """Draw each text and save the pictures."""
    names = OutputNames(args.out, "outputs", len(args.texts))
    system = load_system(args)
    outcomes = Outcomes(len(args.texts))
    for text in args.texts:
        with outcomes.one(text, args.debug):
            image = system.draw(text, seed=args.seed, **generation_settings(args), **drawing_settings(args))
            path = save_picture(image, names.next(text))
            emit(args, {"text": text, "picture": str(path)}, f"{text}: {path}")
    return outcomes.finish()


def edit(args: argparse.Namespace) -> int:
    """Change each picture as instructed and save the results."""
    names = OutputNames(args.out, "outputs", len(args.pictures))
    system = load_system(args)

    def one(name: str, image: Image.Image) -> None:
        changed = system.edit(image, args.instruction, seed=args.seed, **generation_settings(args),
                              **drawing_settings(args))
        path = save_picture(changed, names.next(Path(name).stem, "_edited"))
        emit(args, {"picture": name, "instruction": args.instruction, "edited": str(path)}, f"{name}: {path}")

    return each_picture(args, one)
