"""`seed tokenize | reconstruct | describe | ask | detect | draw | edit`: one result a picture or text.

A bad one is skipped. The first two load no language model.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from seed_multimodal.commands.common import (
    Outcomes,
    OutputNames,
    code_counts,
    drawing_settings,
    each_picture,
    emit,
    generation_settings,
    load_system,
    opened,
    require_picture_place,
    save_picture,
    write_text,
)
from seed_multimodal.entry import log_line
from seed_multimodal.errors import CodesError, ConfigError, DataError, first_line
from seed_multimodal.quiet import quiet_libraries

if TYPE_CHECKING:
    from PIL import Image

    from seed_multimodal.systems.pictures import PictureCodec

T = TypeVar("T")
NO_CODES = "its pictures are features, they have no codes"
MOST_STRIPS = 500  # pictures on the page of `seed tokenize --save-plot`: a longer one cannot be looked at


def tokenize(args: argparse.Namespace) -> int:
    """Print (and with `--out` write) the codes of each picture."""
    if args.save_plot is not None:
        require_picture_place("--save-plot", args.save_plot)
    codec = load_codec(args)
    if not codec.has_codes:
        raise ConfigError(f"{args.model}: {NO_CODES}.")
    outcomes = Outcomes(len(args.pictures))
    lines = []
    shown: list[tuple[str, Image.Image, list[int]]] = []
    for batch in batched(_noted(codec, opened(args.pictures, outcomes, args.debug)), args.batch_size):
        rows = codec.tokenize([image for _, image in batch])
        for (name, image), codes in zip(batch, (row.tolist() for row in rows), strict=True):
            if args.save_plot and len(shown) < MOST_STRIPS:
                image.thumbnail((176, 176))
                shown.append((name, image, codes))
            record = {"picture": name, "codes": codes}
            lines.append(json.dumps(record, ensure_ascii=False))
            emit(args, record, f"{name}: {' '.join(map(str, codes))}")
    if args.out:
        write_text("".join(line + "\n" for line in lines), args.out)
    if shown:
        if len(lines) > len(shown):
            log_line(f"{args.save_plot} shows the first {len(shown)} of {len(lines)} pictures.")
        save_strips(shown, codec, Path(args.save_plot))
    return outcomes.finish()


def _noted(half: Any, named: Iterable[tuple[str, Image.Image]]) -> Iterator[tuple[str, Image.Image]]:
    """Pictures, of which those unlike the training's are logged."""
    for name, image in named:
        if note := half.note([image]):
            log_line(f"{name}: {note}")
        yield name, image


def reconstruct(args: argparse.Namespace) -> int:
    """Rebuild pictures from their codes, or from a file of codes, whole or from the first of them, and save them."""
    file, counts = (args.codes, None) if isinstance(args.codes, str) else (args.codes_file, args.codes)
    if isinstance(args.codes, str) and (args.pictures or args.codes_file):
        raise ConfigError(f"seed reconstruct: --codes takes numbers of codes here, as 8 or 4,8,16,32, not "
                          f"{args.codes!r}.")
    if bool(args.pictures) == bool(file):
        raise ConfigError("seed reconstruct: give either pictures or --codes-file FILE.")
    stored = read_codes(file) if file else []
    total = (len(stored) if file else len(args.pictures)) * len(counts or (0,))
    names, outcomes = OutputNames(args.out, "outputs", total), Outcomes(len(stored) or len(args.pictures))
    codec = load_codec(args)
    if not codec.has_codes:
        if file or counts:
            raise ConfigError(f"{args.model}: {NO_CODES}; give pictures alone.")
        return _rebuild(args, codec, names)
    if not codec.can_draw:
        raise ConfigError(f"{args.model}: has no decoder for its pictures; put a stable-unCLIP folder that draws its "
                          f"embeddings at {Path(args.model) / 'diffusion_model'}.")
    if args.condition is not None:
        raise ConfigError(f"{args.model}: a condition picture is for SEED-X's second stage; here a picture is drawn "
                          f"from its codes alone.")
    named: Iterable[tuple[str, list[int]]]
    if file:
        named = _checked(codec, stored, outcomes, args.debug)
    else:
        named = ((name, codec.tokenize(image)[0].tolist())
                 for name, image in _noted(codec, opened(args.pictures, outcomes, args.debug)))
    for batch in batched(named, args.batch_size):
        images = codec.draw([codes for _, codes in batch for _ in counts or (0,)], seed=args.seed,
                            first=counts and counts * len(batch), **drawing_settings(args))
        for (name, codes), own in zip(batch, batched(images, len(counts or (0,))), strict=True):
            with outcomes.one(name, args.debug):
                saved, said = _save_drawn(own, counts, names, Path(name).stem, "_rebuilt", "rebuilt")
                emit(args, {"picture": name, "codes": codes, **saved}, f"{name}: {said}")
    return outcomes.finish()


def _rebuild(args: argparse.Namespace, pictures: Any, names: OutputNames) -> int:
    """Rebuild pictures from their features."""
    def one(name: str, image: Image.Image) -> None:
        list(_noted(pictures, [(name, image)]))
        rebuilt = pictures.rebuild(image, args.condition and Path(args.condition), args.seed, **drawing_settings(args))
        path = str(save_picture(rebuilt[0], names.next(Path(name).stem, "_rebuilt")))
        emit(args, {"picture": name, "rebuilt": path}, f"{name}: {path}")

    return each_picture(args, one)


def _save_drawn(images: Sequence[Image.Image], counts: Sequence[int] | None, names: OutputNames, stem: str,
                ending: str, key: str) -> tuple[dict[str, Any], str]:
    """Save a picture, or the ones of several numbers of codes and a sheet of them; for JSON under `key`, and in words.
    """
    if counts is None or len(counts) == 1:
        path = str(save_picture(images[0], names.next(stem, ending)))
        return {key: path, **({"from_codes": counts[0]} if counts else {})}, path
    from seed_multimodal.images.sheet import Cell, Row, contact_sheet

    paths = [str(save_picture(image, names.next(stem, f"{ending}_{count}")))
             for count, image in zip(counts, images, strict=True)]
    cells = [Cell(image, f"{count} codes") for count, image in zip(counts, images, strict=True)]
    sheet = str(save_picture(contact_sheet([Row("", cells)]), names.next(stem, f"{ending}_codes")))
    return {key: dict(zip(map(str, counts), paths, strict=True)), "sheet": sheet}, f"{sheet} ({', '.join(paths)})"


def counts_or_file(text: str) -> list[int] | str:
    """The type of `seed reconstruct --codes`: numbers of codes, or a file of codes."""
    return code_counts(text) if re.fullmatch(r"[\d,\s]+", text) else text


def save_strips(shown: Sequence[tuple[str, Image.Image, Sequence[int]]], codec: PictureCodec, path: Path) -> None:
    """Draw a strip of codes beside each picture, on one page."""
    from seed_multimodal.images.sheet import Cell, Row, code_strip, contact_sheet

    rows = [Row(name, [Cell(image), Cell(code_strip(codes, codec.section), wide=5)]) for name, image, codes in shown]
    title = "Pictures and their codes: equal colours in a column are equal codes"
    save_picture(contact_sheet(rows, title, cell=88), path)


def load_codec(args: argparse.Namespace) -> Any:
    """The picture half of the system that the flags name; what loading prints goes to stderr."""
    quiet_libraries(args.debug)
    with contextlib.redirect_stdout(sys.stderr):
        from seed_multimodal.configured import picture_half
        from seed_multimodal.device import limit_threads

        codec = picture_half(args.model, device=args.device, dtype=args.dtype)
    limit_threads(codec.model)
    return codec


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


def detect(args: argparse.Namespace) -> int:
    """Print where something is in each picture, and save the picture with the boxes on it."""
    names = OutputNames(args.out, "outputs", len(args.pictures))
    system = load_system(args)

    def one(name: str, image: Image.Image) -> None:
        found = system.detect(image, args.phrase, seed=args.seed, **generation_settings(args))
        path = str(save_picture(found.drawn(), names.next(Path(name).stem, "_boxes")))
        text = found.text.replace("</s>", "").strip()
        said = "; ".join(" ".join(map(str, box)) for box in found) or text or "not found"
        emit(args, {"picture": name, "phrase": args.phrase, "boxes": [list(box) for box in found], "text": text,
                    "drawn": path, "problems": found.problems}, f"{name}: {said} ({path})")

    return each_picture(args, one)


def draw(args: argparse.Namespace) -> int:
    """Draw each text and save the pictures."""
    names = OutputNames(args.out, "outputs", len(args.texts) * len(args.codes or (0,)))
    system = load_system(args)
    outcomes = Outcomes(len(args.texts))
    for text in args.texts:
        with outcomes.one(text, args.debug):
            drawn = system.draw(text, seed=args.seed, codes=args.codes, **generation_settings(args),
                                **drawing_settings(args))
            drawn = drawn if args.codes else [drawn]
            saved, said = _save_drawn(drawn, args.codes, names, text, "", "picture")
            emit(args, {"text": text, **saved}, f"{text}: {said}")
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
