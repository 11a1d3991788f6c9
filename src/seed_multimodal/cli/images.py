"""`seed tokenize | reconstruct | describe | ask | detect | draw | edit`: batches of images or
texts, one result each.

A bad one is reported and skipped. The first two load no language model.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from seed_multimodal.cli.common import (
    Options,
    Outputs,
    Result,
    chosen_settings,
    emit,
    image_sources,
    load_images,
    load_system,
    open_lines,
    print_json,
    run_batches,
    source_stem,
)
from seed_multimodal.disk import JsonObject, text_stem
from seed_multimodal.entry import bounded_int, log_line
from seed_multimodal.errors import ConfigError, DataError, printable
from seed_multimodal.images.io import ImageSource, StoredImage
from seed_multimodal.models.registry import NEEDS
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.pipelines.world import DESCRIPTION

if TYPE_CHECKING:
    from torch import Tensor

    from seed_multimodal.models.seed_x.pipeline import Detection
    from seed_multimodal.pipelines.base import MultimodalSystem
    from seed_multimodal.pipelines.images import ImageCodec


def tokenize(args: Namespace) -> int:
    """Print (and with `--out` write) the codes of each image."""
    # 1. The encoder.
    SystemConfig.find(args.model).check_ability("draws_codes")
    sources = image_sources(args.images)
    codec = load_images(args)
    lines = open_lines(args.out) if args.out else None

    def read(name: str) -> ImageSource:
        # Ctrl-C could not end a thread that waits for a pipe.
        source = sources[name]
        return source if callable(source) else codec.preprocess(source)

    def work(images: Sequence[ImageSource]) -> Sequence[Tensor]:
        # LaVIT's selection of patches depends on the seed.
        return codec.encode(images, seed=args.seed)

    def show(name: str, codes: Tensor) -> None:
        record = {"image": name, "codes": codes.tolist()}
        if lines is not None:
            print_json(record, lines)
        rows = codes if codes.ndim > 1 else codes[None]
        text = "\n".join(" ".join(map(str, row.tolist())) for row in rows)
        emit(args, record, f"{printable(name)}: {text}")

    # 2. The codes; the file holds the images that did not fail.
    return run_batches(args, args.images, show, work, args.batch_size, read)


def reconstruct(args: Namespace) -> int:
    """Draw images again from their codes or features, or a file of codes, whole or from the first
    of them."""
    if bool(args.images) == bool(args.codes_file):
        raise ConfigError("seed reconstruct: give either images or --codes-file FILE.")

    # 1. What is wrong is reported before long work.
    config = SystemConfig.find(args.model)
    if args.condition:
        config.check_ability("takes_conditions")
        StoredImage(args.condition)
    if args.codes_file:
        config.check_ability("draws_codes")
    stored = read_codes(args.codes_file) if args.codes_file else {}
    names = [*stored, *args.images]
    sources = image_sources(args.images)
    outputs = Outputs(args.out, len(names) * max(1, len(args.codes)))
    codec = load_images(args)
    _check_counts(args, codec)
    settings = chosen_settings(args)
    first_count = {"codes": args.codes[0]} if args.codes else {}
    codec.check_drawing(**settings, **first_count)
    condition = codec.open(args.condition) if args.condition else None

    # 2. Each image: its codes or features, and what is drawn from them.
    def work(names: Sequence[str]) -> list[tuple[Tensor | list[int], Sequence[Image.Image]]]:
        encoded: Sequence[Tensor | list[int]]
        if stored:
            encoded = [stored[name] for name in names]
        else:
            encoded = codec.encode([sources[name] for name in names], seed=args.seed)
        # Each image from the same seed, so that one item is drawn as in any batch.
        options = {**settings, "seeds": [args.seed] * len(encoded), "batch_size": args.batch_size}
        if condition is not None:
            options["conditions"] = [condition] * len(encoded)
        images = _draw_counts(args.codes, partial(codec.draw, encoded, **options))
        return list(zip(encoded, images, strict=True))

    def show(name: str, result: tuple[Tensor | list[int], Sequence[Image.Image]]) -> None:
        encoded, images = result
        stem = source_stem(name)
        saved, paths = _save_counts(images, args.codes, outputs, stem, "rebuilt")
        # Features are too long for a record.
        record: JsonObject = {"image": name}
        if config.abilities.draws_codes:
            record["codes"] = encoded if isinstance(encoded, list) else encoded.tolist()
        emit(args, record | saved, f"{printable(name)}: {paths}")

    return run_batches(args, names, show, work, args.batch_size)


def describe(args: Namespace) -> int:
    """Print a caption for each image."""

    def show(name: str, text: str) -> None:
        emit(args, {"image": name, "description": text}, f"{printable(name)}: {text}")

    return _each_image(args, "describe", args.prompt, show)


def ask(args: Namespace) -> int:
    """Print the answer to one question about each image."""

    def show(name: str, text: str) -> None:
        record = {"image": name, "question": args.question, "answer": text}
        emit(args, record, f"{printable(name)}: {text}")

    return _each_image(args, "ask", args.question, show)


def detect(args: Namespace) -> int:
    """Print where something is in each image, and save the image with the boxes on it."""
    outputs = Outputs(args.out, len(args.images))

    def show(name: str, detection: Detection) -> None:
        path = None
        if detection.boxes:
            path = outputs.save(detection.drawn(), source_stem(name), "_boxes")
        record = {
            "image": name,
            "phrase": args.phrase,
            "boxes": [list(box) for box in detection.boxes],
            "text": detection.text,
            "drawn": path,
            "problems": detection.problems,
        }
        # As text: the boxes, else what the model answered.
        boxes = "; ".join(" ".join(map(str, box)) for box in detection.boxes)
        line = f"{printable(name)}: {boxes or detection.text or 'not found'}"
        emit(args, record, f"{line} ({path})" if path else line)

    return _each_image(args, "detect", args.phrase, show)


def edit(args: Namespace) -> int:
    """Change each image as instructed and save the results."""
    outputs = Outputs(args.out, len(args.images) * args.num_images)

    def show(name: str, images: Sequence[Image.Image]) -> None:
        saved, paths = _save_all(images, outputs, source_stem(name), "edited")
        record = {"image": name, "instruction": args.instruction, **saved}
        emit(args, record, f"{printable(name)}: {paths}")

    return _each_image(args, "edit", args.instruction, show, args.num_images)


def draw(args: Namespace) -> int:
    """Draw each text and save the images."""
    if args.codes and args.num_images > 1:
        raise ConfigError("seed draw: give either --codes or --num-images.")
    images_of_text = max(1, len(args.codes)) * args.num_images
    outputs = Outputs(args.out, len(args.texts) * images_of_text)
    system, options = _load(args)
    _check_counts(args, system.images)

    # Several images of a text: of several numbers of codes, or of several seeds.
    def work(texts: Sequence[str]) -> list[Sequence[Image.Image]]:
        if args.codes:
            return _draw_counts(args.codes, partial(system.draw, texts, **options))
        images = system.draw(texts, num_images=args.num_images, **options)
        return list(batched(images, args.num_images))

    def show(text: str, images: Sequence[Image.Image]) -> None:
        saved, paths = _save_counts(images, args.codes, outputs, text_stem(text))
        emit(args, {"text": text, **saved}, f"{text}: {paths}")

    return run_batches(args, args.texts, show, work, args.batch_size)


def read_codes(path: str) -> dict[str, list[Any]]:
    """Codes by name, from a file of JSON lines as `seed tokenize --out` writes them, or lists of
    numbers.

    Raises DataError: no such file, or a line that is neither.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file.")
    # Blank lines are skipped.
    codes_of: dict[str, list[Any]] = {}  # a row, or of grids rows
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        for row, line in enumerate(filter(str.strip, lines), 1):
            value = json.loads(line)
            # Lists have no names.
            if isinstance(value, dict):
                name, codes = value["image"], value["codes"]
            else:
                name, codes = f"codes_{row}", value
            # Several rows may be of one image.
            key = f"{name} ({row})" if name in codes_of else name
            codes_of[key] = [
                [*map(int, item)] if isinstance(item, list) else int(item) for item in codes
            ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: row {len(codes_of) + 1} is no list of codes, nor an object with image and "
            f"codes ({error})."
        ) from error
    return codes_of


def counts(text: str) -> list[int]:
    """Comma-separated numbers, each one once."""
    parse = bounded_int(1)
    return list(dict.fromkeys(parse(item.strip()) for item in text.split(",")))


def _check_counts(args: Namespace, codec: ImageCodec) -> None:
    if args.codes and "codes" not in codec.drawing_settings:
        raise ConfigError(f"{args.model}: --codes needs ordered codes, as SEED-LLaMA's.")


def _load(args: Namespace) -> tuple[MultimodalSystem, Options]:
    """The system, and the keywords of its methods."""
    # Commands without flags of drawing need no diffusion model.
    system = load_system(args, load_decoder=hasattr(args, "num_inference_steps"))
    options = {"seed": args.seed, "batch_size": args.batch_size, **chosen_settings(args)}
    return system, options


def _each_image(
    args: Namespace,
    method: str,
    text: str | None,
    show: Callable[[str, Result], None],
    num_images: int = 0,
) -> int:
    """Run a method of the system on batches of `args.images` and `show` each result, or the
    `num_images` results of each; returns the exit code."""
    SystemConfig.find(args.model).check_ability(NEEDS[method])
    system, options = _load(args)
    if num_images:
        options["num_images"] = num_images
    sources = image_sources(args.images)

    # The methods answer a list of images by a list of results, image by image.
    def work(names: Sequence[str]) -> Sequence[Any]:
        images = [sources[name] for name in names]
        results: Sequence[Any] = getattr(system, method)(images, text, **options)
        return list(batched(results, num_images)) if num_images else results

    return run_batches(args, args.images, show, work, args.batch_size)


def _draw_counts(
    counts: Sequence[int], draw: Callable[..., Sequence[Image.Image]]
) -> list[Sequence[Image.Image]]:
    """The images of each item: one, or one for each number of codes in `counts`."""
    if not counts:
        return [[image] for image in draw()]
    # [counts][items] → [items][counts]
    images_of_counts = [draw(codes=count) for count in counts]
    return list(zip(*images_of_counts, strict=True))


def batched(images: Sequence[Image.Image], size: int) -> Iterator[Sequence[Image.Image]]:
    """The images in groups of `size`."""
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _save_all(
    images: Sequence[Image.Image], outputs: Outputs, stem: str, task: str = ""
) -> tuple[JsonObject, str]:
    """Save the images of one request, named by what was done; returns a record with their paths (a
    path, or a list of several) under `task` or "image", and the paths as text."""
    tag = task and f"_{task}"
    paths = [outputs.save(image, stem, tag) for image in images]
    record: JsonObject = {task or "image": paths[0] if len(paths) == 1 else paths}
    descriptions = [image.info[DESCRIPTION] for image in images if DESCRIPTION in image.info]
    if descriptions:
        log_line(f"read back: {' / '.join(descriptions)}")
        record["descriptions"] = descriptions
    return record, ", ".join(paths)


def _save_counts(
    images: Sequence[Image.Image],
    counts: Sequence[int],
    outputs: Outputs,
    stem: str,
    task: str = "",
) -> tuple[JsonObject, str]:
    """Save the images of one request, or those of several numbers of codes and a sheet of them;
    returns as `_save_all`."""
    if len(counts) < 2:
        return _save_all(images, outputs, stem, task)
    from seed_multimodal.images.sheet import Cell, Row, contact_sheet

    # One file for each number, and all side by side.
    tag = task and f"_{task}"
    paths: dict[str, str] = {}
    cells = []
    for count, image in zip(counts, images, strict=True):
        paths[str(count)] = outputs.save(image, stem, f"{tag}_{count}")
        cells.append(Cell(image, f"{count} codes"))
    sheet = outputs.save(contact_sheet([Row("", cells)]), stem, f"{tag}_codes")
    return {task or "image": paths, "sheet": sheet}, f"{sheet} ({', '.join(paths.values())})"
