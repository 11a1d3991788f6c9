"""`seed tokenize | reconstruct | describe | ask | draw | edit`: one result a picture or text; a bad one is skipped.

The first two load no language model.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from seed_multimodal.commands.common import (
    Outcomes,
    OutputNames,
    drawing_settings,
    each_picture,
    emit,
    generation_settings,
    load_system,
    opened,
    save_picture,
    write_text,
)
from seed_multimodal.errors import CodesError, ConfigError, DataError, first_line
from seed_multimodal.quiet import quiet_libraries

if TYPE_CHECKING:
    from PIL import Image

    from seed_multimodal.systems.pictures import PictureCodec

T = TypeVar("T")


def tokenize(args: argparse.Namespace) -> int:
    """Print (and with `--out` write) the codes of each picture."""
    codec = load_codec(args)
    outcomes = Outcomes(len(args.pictures))
    lines = []
    for batch in batched(opened(args.pictures, outcomes, args.debug), args.batch_size):
        for (name, _), codes in zip(batch, codec.tokenize([image for _, image in batch]).tolist(), strict=True):
            record = {"picture": name, "codes": codes}
            lines.append(json.dumps(record, ensure_ascii=False))
            emit(args, record, f"{name}: {' '.join(map(str, codes))}")
    if args.out:
        write_text("".join(line + "\n" for line in lines), args.out)
    return outcomes.finish()


def reconstruct(args: argparse.Namespace) -> int:
    """Rebuild pictures from their codes, or from a file of codes, and save them."""
    if bool(args.pictures) == bool(args.codes):
        raise ConfigError("seed reconstruct: give either pictures or --codes FILE.")
    stored = read_codes(args.codes) if args.codes else []
    total = len(stored) if args.codes else len(args.pictures)
    names, outcomes = OutputNames(args.out, "outputs", total), Outcomes(total)
    codec = load_codec(args)
    named: Iterable[tuple[str, list[int]]]
    if args.codes:
        named = _checked(codec, stored, outcomes, args.debug)
    else:
        named = ((name, codec.tokenize(image)[0].tolist())
                 for name, image in opened(args.pictures, outcomes, args.debug))
    for batch in batched(named, args.batch_size):
        images = codec.draw([codes for _, codes in batch], seed=args.seed, **drawing_settings(args))
        for (name, codes), image in zip(batch, images, strict=True):
            with outcomes.one(name, args.debug):
                path = save_picture(image, names.next(Path(name).stem, "_rebuilt"))
                emit(args, {"picture": name, "codes": codes, "rebuilt": str(path)}, f"{name}: {path}")
    return outcomes.finish()


def load_codec(args: argparse.Namespace) -> PictureCodec:
    """The picture half of the system that the flags name; what loading prints goes to stderr."""
    quiet_libraries(args.debug)
    with contextlib.redirect_stdout(sys.stderr):
        from seed_multimodal.configured import picture_codec

        return picture_codec(args.model, device=args.device, dtype=args.dtype)


def read_codes(path: str) -> list[tuple[str, Any]]:
    """(name, codes) from a file of JSON lines as `seed tokenize --out` writes them, or bare lists of numbers.

    Raises:
        DataError: no such file, or a line that is neither.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # also no text file, or no file's name
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not a text file'}).") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # also numbers of 5,000 digits, and brackets nested without end
            raise DataError(f"{path}, line {number}: not JSON ({getattr(error, 'msg', first_line(error))}).") from error
        codes = value.get("codes") if isinstance(value, dict) else value
        name = str(value.get("picture", f"codes_{number}")) if isinstance(value, dict) else f"codes_{number}"
        if not isinstance(codes, list):
            raise DataError(f"{path}, line {number}: holds no list of codes.")
        found.append((name, codes))
    if not found:
        raise DataError(f"{path}: holds no codes.")
    return found


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` items, in order."""
    source = iter(items)
    while batch := list(itertools.islice(source, min(size, sys.maxsize))):
        yield batch


def _checked(
    codec: PictureCodec, stored: list[tuple[str, Any]], outcomes: Outcomes, debug: bool
) -> Iterator[tuple[str, list[int]]]:
    for name, codes in stored:
        row = None
        with outcomes.one(name, debug):
            if not all(isinstance(code, int) and not isinstance(code, bool) for code in codes):
                raise CodesError(f"{name}: codes must be whole numbers.")
            row = codec.check_codes(codes)[0].tolist()
        if row is not None:
            yield name, row


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
