"""`seed tokenize | reconstruct | describe | ask | detect | draw | edit`: batches of images or texts, one result each.

A bad one is reported and skipped. The first two load no language model.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seed_multimodal.cli.common import (
    IMAGE_SUFFIXES,
    Outcomes,
    Outputs,
    code_counts,
    drawing_settings,
    emit,
    generation_settings,
    load_images,
    load_system,
    noted,
    require_room,
    save_image,
    slug,
    write_text,
)
from seed_multimodal.entry import log_line
from seed_multimodal.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image

MOST_STRIPS = 500  # images on the page of `seed tokenize --save-plot`


# ---- images ⇄ codes


def tokenize(args: argparse.Namespace) -> int:
    """Print (and with `--out` write) the codes of each image."""
    plot = Path(args.save_plot) if args.save_plot else None
    if plot is not None:
        if plot.suffix.lower() not in IMAGE_SUFFIXES:
            raise ConfigError(f"--save-plot {plot}: not the name of an image file, such as codes.png.")
        require_room(plot.parent)
    codec = load_images(args)
    if not hasattr(codec, "section"):
        raise ConfigError(f"{args.model}: its images are features, they have no codes.")
    outcomes = Outcomes(len(args.images), args.debug)
    lines = []
    strips: list[tuple[str, Image.Image, list[int]]] = []

    def work(images: list[Image.Image]) -> list[tuple[Image.Image, list[int]]]:
        return list(zip(images, (row.tolist() for row in codec.encode(images)), strict=True))

    opened = noted(outcomes.opened(args.images, codec.open), lambda image: codec.note([image]))
    for name, (image, codes) in outcomes.results(opened, work, args.batch_size):
        if plot is not None and len(strips) < MOST_STRIPS:
            image.thumbnail((176, 176))
            strips.append((name, image, codes))
        record = {"picture": name, "codes": codes}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        emit(args, record, f"{name}: {' '.join(map(str, codes))}")
    if args.out:
        write_text("".join(lines), args.out)
    if plot is not None and strips:
        if len(lines) > len(strips):
            log_line(f"{plot} shows the first {len(strips)} of {len(lines)} images.")
        save_strips(strips, codec.section, plot)
    return outcomes.finish()


def save_strips(strips: Sequence[tuple[str, Image.Image, Sequence[int]]], section: int, path: Path) -> None:
    """Draw a strip of codes beside each image, on one page."""
    from seed_multimodal.images.sheet import Cell, Row, code_strip, contact_sheet

    rows = [Row(name, [Cell(image), Cell(code_strip(codes, section), wide=5)]) for name, image, codes in strips]
    save_image(contact_sheet(rows, "Images and their codes: equal colours in a column are equal codes", cell=88), path)


def reconstruct(args: argparse.Namespace) -> int:
    """Draw images again from their codes or features, or a file of codes, whole or from the first of them."""
    file, counts = (args.codes, None) if isinstance(args.codes, str) else (args.codes_file, args.codes)
    if bool(args.images) == bool(file):
        raise ConfigError("seed reconstruct: give either images or --codes-file FILE.")
    stored = read_codes(file) if file else []
    number = len(stored) or len(args.images)
    outputs, outcomes = Outputs(args.out, number * len(counts or [0]), args.images), Outcomes(number, args.debug)
    codec = load_images(args)
    has_codes = hasattr(codec, "section")
    if file and not has_codes:
        raise ConfigError(f"{args.model}: its images are features, they have no codes; give images.")
    drawing = drawing_settings(args)
    check_counts(args.model, codec, counts)
    codec.check_drawing(**drawing)
    if args.condition is not None:
        drawing["conditions"] = [codec.open(args.condition)]

    def work(values: list[Any]) -> list[Any]:
        encoded = values if file else list(codec.encode(values))
        options = {**drawing, "seeds": [args.seed] * len(values), "batch_size": args.batch_size}
        if args.condition is not None:
            options["conditions"] = drawing["conditions"] * len(values)
        drawn = [codec.draw(encoded, **options, **({"codes": one} if one else {})) for one in counts or [None]]
        return list(zip(encoded, zip(*drawn, strict=True), strict=True))

    named: Iterable[tuple[str, Any]] = stored
    if not file:
        named = noted(outcomes.opened(args.images, codec.open), lambda image: codec.note([image]))
    for name, (codes, images) in outcomes.results(named, work, args.batch_size):
        with outcomes.one(name):
            saved, text = save_drawn(images, counts, outputs, f"{Path(name).stem}_rebuilt", "rebuilt")
            known = {"codes": [int(code) for code in codes]} if has_codes else {}
            emit(args, {"picture": name, **known, **saved}, f"{name}: {text}")
    return outcomes.finish()


def counts_or_file(text: str) -> list[int] | str:
    """The type of `seed reconstruct --codes`: numbers of codes, or a file of codes."""
    return code_counts(text) if re.fullmatch(r"[\d,\s]+", text) else text


def read_codes(path: str) -> list[tuple[str, list[int]]]:
    """(name, codes) from a file of JSON lines as `seed tokenize --out` writes them, or bare lists of numbers.

    Raises:
        DataError: no such file, or a line that is neither.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not a text file'}).") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
        name = str(value.get("picture", f"codes_{number}")) if isinstance(value, dict) else f"codes_{number}"
        codes = value.get("codes") if isinstance(value, dict) else value
        if not isinstance(codes, list) or not all(isinstance(code, int) for code in codes):
            raise DataError(f"{path}, line {number}: holds no list of codes.")
        found.append((name, codes))
    if not found:
        raise DataError(f"{path}: holds no codes.")
    return found


def check_counts(model: str, codec: Any, counts: Sequence[int] | None) -> None:
    """Raise ConfigError where images cannot be drawn from their first codes."""
    if counts and not codec.progressive:
        raise ConfigError(f"{model}: its images cannot be drawn from their first codes alone, as --codes asks.")


def save_drawn(images: Sequence[Image.Image], counts: Sequence[int] | None, outputs: Outputs, stem: str, key: str
               ) -> tuple[dict[str, Any], str]:
    """Save an image, or those of several numbers of codes and a sheet of them; for JSON under `key`, and in words."""
    if counts is None or len(counts) == 1:
        path = str(save_image(images[0], outputs.next(stem)))
        return {key: path, **({"from_codes": counts[0]} if counts else {})}, path
    from seed_multimodal.images.sheet import Cell, Row, contact_sheet

    paths = [str(save_image(image, outputs.next(f"{stem}_{count}")))
             for count, image in zip(counts, images, strict=True)]
    cells = [Cell(image, f"{count} codes") for count, image in zip(counts, images, strict=True)]
    sheet = str(save_image(contact_sheet([Row("", cells)]), outputs.next(f"{stem}_codes")))
    return {key: dict(zip(map(str, counts), paths, strict=True)), "sheet": sheet}, f"{sheet} ({', '.join(paths)})"


# ---- with the language model


def describe(args: argparse.Namespace) -> int:
    """Print a caption for each image."""
    system = load_system(args)
    options = {"seed": args.seed, **generation_settings(args)}
    return _each_image(args, system, args.prompt or "", lambda images: system.describe(images, args.prompt, **options),
                       lambda name, text: emit(args, {"picture": name, "description": text}, f"{name}: {text}"))


def ask(args: argparse.Namespace) -> int:
    """Print the answer to one question about each image."""
    system = load_system(args)
    options = {"seed": args.seed, **generation_settings(args)}
    return _each_image(args, system, args.question, lambda images: system.ask(images, args.question, **options),
                       lambda name, text: emit(args, {"picture": name, "question": args.question, "answer": text},
                                               f"{name}: {text}"))


def detect(args: argparse.Namespace) -> int:
    """Print where something is in each image, and save the image with the boxes on it."""
    outputs = Outputs(args.out, len(args.images), args.images)
    system = load_system(args)
    options = {"seed": args.seed, **generation_settings(args)}

    def show(name: str, found: Any) -> None:
        for problem in found.problems:
            log_line(f"{name}: {problem}")
        path = str(save_image(found.drawn(), outputs.next(f"{Path(name).stem}_boxes")))
        text = found.text.replace("</s>", "").strip()
        boxes = "; ".join(" ".join(map(str, box)) for box in found) or text or "not found"
        emit(args, {"picture": name, "phrase": args.phrase, "boxes": [list(box) for box in found], "text": text,
                    "drawn": path, "problems": found.problems}, f"{name}: {boxes} ({path})")

    return _each_image(args, system, args.phrase, lambda images: system.detect(images, args.phrase, **options), show)


def edit(args: argparse.Namespace) -> int:
    """Change each image as instructed and save the results."""
    outputs = Outputs(args.out, len(args.images), args.images)
    system = load_system(args)
    options = {"seed": args.seed, **generation_settings(args), **drawing_settings(args)}

    def show(name: str, image: Image.Image) -> None:
        path = str(save_image(image, outputs.next(f"{Path(name).stem}_edited")))
        emit(args, {"picture": name, "instruction": args.instruction, "edited": path}, f"{name}: {path}")

    return _each_image(args, system, args.instruction,
                       lambda images: system.edit(images, args.instruction, **options), show)


def draw(args: argparse.Namespace) -> int:
    """Draw each text and save the images."""
    from seed_multimodal.language.messages import Message

    outputs = Outputs(args.out, len(args.texts) * len(args.codes or [0]))
    system = load_system(args)
    note, system.log = system.note, None  # notes are logged here, with their texts
    check_counts(args.model, system.images, args.codes)
    options = {"seed": args.seed, **generation_settings(args), **drawing_settings(args)}

    def work(texts: list[str]) -> list[Any]:
        drawn = [system.draw(texts, **options, **({"codes": one} if one else {})) for one in args.codes or [None]]
        return list(zip(*drawn, strict=True))

    outcomes = Outcomes(len(args.texts), args.debug)
    named = noted(((text, text) for text in args.texts), lambda text: note(Message("user", (text,))))
    for text, images in outcomes.results(named, work, args.batch_size):
        with outcomes.one(text):
            saved, said = save_drawn(images, args.codes, outputs, slug(text), "picture")
            emit(args, {"text": text, **saved}, f"{text}: {said}")
    return outcomes.finish()


def _each_image(args: argparse.Namespace, system: Any, text: str, work: Callable[[list[Any]], Sequence[Any]],
                show: Callable[[str, Any], None]) -> int:
    """Run `work` on batches of `args.images`, `show` each result; returns the exit code."""
    from seed_multimodal.language.messages import Message

    outcomes = Outcomes(len(args.images), args.debug)
    named = noted(outcomes.opened(args.images, system.images.open),
                  lambda image: system.note(Message("user", (image, text))))
    system.log = None  # notes are logged here, with the names of the images
    for name, result in outcomes.results(named, work, args.batch_size):
        with outcomes.one(name):
            show(name, result)
    return outcomes.finish()
