"""`seed tokenize | reconstruct | describe | ask | detect | draw | edit`: batches of images or texts, one result each.

A bad one is reported and skipped. The first two load no language model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from seed_multimodal.cli import common
from seed_multimodal.entry import log_line
from seed_multimodal.errors import ConfigError, DataError


def tokenize(args: argparse.Namespace) -> int:
    """Print (and with `--out` write) the codes of each image."""
    codec = common.load_images(args)
    _require_codes(args, codec)
    records: list[dict[str, Any]] = []

    def show(name: str, codes: Any) -> None:
        records.append({"image": name, "codes": codes.tolist()})
        common.emit(args, records[-1], f"{name}: {' '.join(map(str, codes.tolist()))}")

    code = common.run_batches(
        args, args.images, show, lambda names: encode(args, codec, names), args.batch_size
    )
    if args.out:
        common.write_text(
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), args.out
        )
    return code


def encode(args: argparse.Namespace, codec: Any, names: Sequence[str]) -> Any:
    """Codes or features of images; LaVIT's selection of patches follows `--seed`."""
    return codec.encode(names, seed=args.seed) if codec.encodes_by_seed else codec.encode(names)


def reconstruct(args: argparse.Namespace) -> int:
    """Draw images again from their codes or features, or a file of codes, whole or from the first of them."""
    if bool(args.images) == bool(args.codes_file):
        raise ConfigError("seed reconstruct: give either images or --codes-file FILE.")
    stored = read_codes(args.codes_file) if args.codes_file else {}
    names = [*stored, *args.images]
    outputs = common.Outputs(args.out, len(names) * len(args.codes or [0]))
    codec, settings = common.load_images(args), common.chosen_settings(args)
    if stored:
        _require_codes(args, codec)
    codec.check_drawing(**settings, **({"codes": args.codes[0]} if args.codes else {}))
    if args.condition:
        condition = codec.open(args.condition)

    def work(names: Sequence[str]) -> list[tuple[Any, Sequence[Image.Image]]]:
        values = [stored[name] for name in names] if stored else list(encode(args, codec, names))
        options = {**settings, "seeds": [args.seed] * len(values), "batch_size": args.batch_size}
        if args.condition:
            options["conditions"] = [condition] * len(values)
        drawn = _for_counts(args.codes, lambda **codes: codec.draw(values, **options, **codes))
        return list(zip(values, drawn, strict=True))

    def show(name: str, result: tuple[Any, Sequence[Image.Image]]) -> None:
        saved, paths = _save_drawn(
            result[1], args.codes, outputs, f"{Path(name).stem}_rebuilt", "rebuilt"
        )
        codes = {"codes": [int(code) for code in result[0]]} if hasattr(codec, "section") else {}
        common.emit(args, {"image": name, **codes, **saved}, f"{name}: {paths}")

    return common.run_batches(args, names, show, work, args.batch_size)


def describe(args: argparse.Namespace) -> int:
    """Print a caption for each image."""
    return _each_image(
        args,
        "describe",
        args.prompt,
        lambda name, text: common.emit(
            args, {"image": name, "description": text}, f"{name}: {text}"
        ),
    )


def ask(args: argparse.Namespace) -> int:
    """Print the answer to one question about each image."""
    return _each_image(
        args,
        "ask",
        args.question,
        lambda name, text: common.emit(
            args, {"image": name, "question": args.question, "answer": text}, f"{name}: {text}"
        ),
    )


def detect(args: argparse.Namespace) -> int:
    """Print where something is in each image, and save the image with the boxes on it."""
    outputs = common.Outputs(args.out, len(args.images))

    def show(name: str, detection: Any) -> None:
        for problem in detection.problems:
            log_line(f"{name}: {problem}")
        path = (
            outputs.save(detection.drawn(), f"{Path(name).stem}_boxes") if detection.boxes else None
        )
        boxes = (
            "; ".join(" ".join(map(str, box)) for box in detection.boxes)
            or detection.text
            or "not found"
        )
        record = {
            "image": name,
            "phrase": args.phrase,
            "boxes": [list(box) for box in detection.boxes],
            "text": detection.text,
        }
        line = f"{name}: {boxes} ({path})" if path else f"{name}: {boxes}"
        common.emit(args, record | {"drawn": path, "problems": detection.problems}, line)

    return _each_image(args, "detect", args.phrase, show)


def edit(args: argparse.Namespace) -> int:
    """Change each image as instructed and save the results."""
    outputs = common.Outputs(args.out, len(args.images) * args.num_images)
    system, options = _load(args)

    def work(names: Sequence[str]) -> list[Sequence[Image.Image]]:
        edited = system.edit(list(names), args.instruction, num_images=args.num_images, **options)
        return [*batched(edited, args.num_images)]

    def show(name: str, images: Sequence[Image.Image]) -> None:
        saved, paths = _save_several(images, outputs, f"{Path(name).stem}_edited", "edited")
        common.emit(
            args, {"image": name, "instruction": args.instruction, **saved}, f"{name}: {paths}"
        )

    return common.run_batches(args, args.images, show, work, args.batch_size)


def draw(args: argparse.Namespace) -> int:
    """Draw each text and save the images."""
    if args.codes and args.num_images > 1:
        raise ConfigError("seed draw: give either --codes or --num-images.")
    outputs = common.Outputs(args.out, len(args.texts) * len(args.codes or [0]) * args.num_images)
    system, options = _load(args)

    def work(texts: Sequence[str]) -> list[Sequence[Image.Image]]:
        if args.codes:
            return _for_counts(args.codes, lambda **codes: system.draw(texts, **options, **codes))
        return [
            *batched(system.draw(texts, num_images=args.num_images, **options), args.num_images)
        ]

    def show(text: str, images: Sequence[Image.Image]) -> None:
        if args.codes:
            saved, paths = _save_drawn(images, args.codes, outputs, common.slug(text), "image")
        else:
            saved, paths = _save_several(images, outputs, common.slug(text), "image")
        common.emit(args, {"text": text, **saved}, f"{text}: {paths}")

    return common.run_batches(args, args.texts, show, work, args.batch_size)


def read_codes(path: str) -> dict[str, list[int]]:
    """Codes by name, from a file of JSON lines as `seed tokenize --out` writes them, or bare lists of numbers.
    Raises DataError: no such file, or a line that is neither."""
    rows: dict[str, list[int]] = {}
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file.")
    try:
        for number, line in enumerate(
            filter(str.strip, Path(path).read_text(encoding="utf-8").splitlines()), 1
        ):
            value = json.loads(line)
            name, codes = (
                (value["image"], value["codes"])
                if isinstance(value, dict)
                else (f"codes_{number}", value)
            )
            rows[name] = [int(code) for code in codes]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: row {len(rows) + 1} is no list of codes, nor an object with image and codes "
            f"({error})."
        ) from error
    return rows


def _require_codes(args: argparse.Namespace, codec: Any) -> None:
    if not hasattr(codec, "section"):
        raise ConfigError(f"{args.model}: its images are features, they have no codes.")


def _load(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The system, and the keywords of its methods."""
    system = common.load_system(args, load_decoder=hasattr(args, "num_inference_steps"))
    return system, {
        "seed": args.seed,
        "batch_size": args.batch_size,
        **common.chosen_settings(args),
    }


def _each_image(
    args: argparse.Namespace, method: str, text: str | None, show: Callable[[str, Any], None]
) -> int:
    """Run a method of the system on batches of `args.images`, `show` each result; returns the exit code."""
    system, options = _load(args)

    def work(names: Sequence[str]) -> Sequence[Any]:
        results: Sequence[Any] = getattr(system, method)(list(names), text, **options)
        return results

    return common.run_batches(args, args.images, show, work, args.batch_size)


def _for_counts(
    counts: Sequence[int] | None, draw: Callable[..., Sequence[Image.Image]]
) -> list[Sequence[Image.Image]]:
    """The images of each item: one, or one for each number of codes in `counts`."""
    return list(
        zip(*([draw(codes=count) for count in counts] if counts else [draw()]), strict=True)
    )


def batched(images: Sequence[Image.Image], size: int) -> Iterator[Sequence[Image.Image]]:
    """The images in groups of `size`."""
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _save_several(
    images: Sequence[Image.Image], outputs: common.Outputs, stem: str, key: str
) -> tuple[dict[str, Any], str]:
    """Save the images of one request; for JSON under `key` (one path, or a list of several), and in words."""
    paths = [outputs.save(image, stem) for image in images]
    return {key: paths[0] if len(paths) == 1 else paths}, ", ".join(paths)


def _save_drawn(
    images: Sequence[Image.Image],
    counts: Sequence[int] | None,
    outputs: common.Outputs,
    stem: str,
    key: str,
) -> tuple[dict[str, Any], str]:
    """Save an image, or those of several numbers of codes and a sheet of them; for JSON under `key`, and in words."""
    if counts is None or len(counts) == 1:
        path = outputs.save(images[0], stem)
        return {key: path}, path
    from seed_multimodal.images.sheet import Cell, Row, contact_sheet

    drawn = dict(zip(counts, images, strict=True))
    paths = {str(count): outputs.save(image, f"{stem}_{count}") for count, image in drawn.items()}
    cells = [Cell(image, f"{count} codes") for count, image in drawn.items()]
    sheet = outputs.save(contact_sheet([Row("", cells)]), f"{stem}_codes")
    return {key: paths, "sheet": sheet}, f"{sheet} ({', '.join(paths.values())})"
