"""Shared by every command: flags, loading a system, skipping bad pictures, saving without overwriting.

Results go to stdout, everything else (what runs where, progress, refusals) to stderr, so that output can be piped.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import mimetypes
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from seed_multimodal.config import project_root
from seed_multimodal.disk import disk_reason, replacing, writing
from seed_multimodal.entry import DONE, SOME_FAILED, add_debug, add_device, log_line, whole_number
from seed_multimodal.errors import (
    CodesError,
    ConfigError,
    GenerationError,
    ImageError,
    RequestError,
    SeedError,
    first_line,
)
from seed_multimodal.lavit.ratios import RATIOS
from seed_multimodal.quiet import quiet_libraries

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
KEPT_RATIOS = ("restore", "keep", "square")  # `seed_x.views.Ratio`, which is not imported with every program
MOST_BYTES = 200  # of a result's name; systems take 255, with an ending, a number and what a file half written adds
# Errors of one picture or text; any other (weights, settings) stops the whole command.
OF_ONE_PICTURE = (ImageError, CodesError, GenerationError, RequestError)


def add_common(parser: argparse.ArgumentParser, model: str = "nano", *, debug: bool = True) -> None:
    """Flags that every command with a system has; `debug=False` where `entry.run_program` adds that one."""
    group = parser.add_argument_group("model and machine")
    group.add_argument("--model", default=model, metavar="NAME", help="nano, nano-x and nano-lavit (shipped), 8b, "
                       f"14b, seed-x, seed-x-i, seed-x-edit, lavit, or a system folder (default: {model})")
    add_device(group)
    group.add_argument("--seed", type=int, default=0, help="random seed; the same seed gives the same result")
    if debug:
        add_debug(parser)


def add_json(parser: argparse.ArgumentParser, what: str = "one JSON object on stdout") -> None:
    """`--json` and `--debug`, for commands without a system."""
    parser.add_argument("--json", action="store_true", help=what)
    add_debug(parser)


def add_out(parser: argparse.ArgumentParser) -> None:
    """`--out` of commands that save pictures."""
    parser.add_argument("--out", metavar="PATH", help="folder, or a file for one picture (default: outputs)")


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Flags of text generation; what is not given follows the system's own settings."""
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, metavar="N")
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token each time")
    group.add_argument("--top-p", type=float, metavar="P", help="0 does so, too")
    group.add_argument("--num-beams", type=int, metavar="N")


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """Flags of the de-tokenizer; what is not given follows its own settings."""
    group = parser.add_argument_group("drawing")
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    group.add_argument("--guidance-scale", type=float, metavar="G")


def add_beside(parser: argparse.ArgumentParser) -> None:
    """Flags of drawing beside a source or condition picture."""
    parser.add_argument("--image-guidance-scale", type=float, metavar="G", help="SEED-X: towards that picture")
    parser.add_argument("--ratio", choices=(*KEPT_RATIOS, *RATIOS), help="of the result; SEED-X: restore or keep that "
                        "of the source or condition picture, or square as released (default: restore); LaVIT: 3:2 …")


def code_counts(text: str) -> list[int]:
    """The type of `--codes`: numbers of codes, `8` or `4,8,16,32`, each once."""
    return list(dict.fromkeys(whole_number(1)(word.strip()) for word in text.split(",")))


def add_codes(parser: argparse.ArgumentParser, kind: Callable[[str], Any] = code_counts, more: str = "") -> None:
    """`--codes` of commands that draw; `more`: what else it takes."""
    parser.add_argument("--codes", type=kind, metavar="N,N,…", help="progressive drawing: the picture after the first "
                        f"N codes; several numbers (4,8,16,32): one picture each, and a sheet of them{more}")


def generation_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The generation flags that were given, as keyword arguments of a system's methods."""
    names = ("max_new_tokens", "temperature", "top_p", "num_beams")
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def drawing_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The drawing flags that were given, as keyword arguments of the de-tokenizer."""
    names = {"steps": "num_inference_steps", "guidance_scale": "guidance_scale",
             "image_guidance_scale": "image_guidance_scale", "ratio": "ratio", "height": "height", "width": "width"}
    return {ours: getattr(args, flag) for flag, ours in names.items() if getattr(args, flag, None) is not None}


def load_system(args: argparse.Namespace) -> Any:
    """The system that the flags describe; what it says of itself and of requests goes to stderr."""
    quiet_libraries(args.debug)
    with contextlib.redirect_stdout(sys.stderr):
        from seed_multimodal.device import limit_threads
        from seed_multimodal.systems.open_system import open_system

        system = open_system(args.model, device=args.device, dtype=args.dtype, log=log_line,
                             offload=getattr(args, "offload", False), quantization=getattr(args, "quantization", None))
    limit_threads(system.llm, system.pictures.model)
    return system


@dataclass
class Outcomes:
    """Counts successes; prints one sentence for each failure, and a summary."""

    total: int
    failed: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def one(self, name: str, debug: bool = False) -> Iterator[None]:
        """Run the work on one picture; its refusal is printed and counted."""
        try:
            yield
        except OF_ONE_PICTURE as error:
            if debug:
                raise
            self.failed.append(name if len(name) <= MOST_BYTES else f"{name[:MOST_BYTES]}…")
            log_line(f"seed: {sentence(error, self.failed[-1])}")

    def finish(self) -> int:
        """The exit code: 0, or 1 with a summary when something was refused."""
        if not self.failed:
            return DONE
        log_line(f"seed: {self.total - len(self.failed)} of {self.total} done, {len(self.failed)} refused: "
                 f"{', '.join(name if name.strip() else repr(name) for name in self.failed)}.")
        return SOME_FAILED


def sentence(error: SeedError, name: str) -> str:
    """The error's own sentence, with the picture's name in front unless it holds it."""
    text = str(error)
    return text if Path(name).name in text else f"{name}: {text}"


def opened(pictures: Iterable[str], outcomes: Outcomes, debug: bool = False) -> Iterator[tuple[str, Image.Image]]:
    """Each readable picture with its name; unreadable ones are reported and skipped."""
    from seed_multimodal.images.io import open_image

    for name in pictures:
        image = None
        with outcomes.one(name, debug):
            image = open_image(name)
        if image is not None:
            yield name, image


def each_picture(args: argparse.Namespace, work: Callable[[str, Image.Image], None]) -> int:
    """Run `work` on each of `args.pictures`, with its name; returns the exit code."""
    outcomes = Outcomes(len(args.pictures))
    for name, image in opened(args.pictures, outcomes, args.debug):
        with outcomes.one(name, args.debug):
            work(name, image)
    return outcomes.finish()


def _of_a_picture(ending: str) -> bool:
    """Whether a suffix is a picture format that is not written here, or a misspelt one that is (`.pgn`)."""
    other = str(mimetypes.types_map.get(ending)).startswith("image/") or ending in Image.registered_extensions()
    return other or (len(ending) > 3 and bool(difflib.get_close_matches(ending, PICTURE_SUFFIXES, n=1, cutoff=0.7)))


class OutputNames:
    """File names for results: into a folder, or the one file that was asked for; never one name for two results, nor
    that of one of `sources`."""

    def __init__(self, out: str | None, default_folder: str, count: int, sources: Iterable[str] = ()) -> None:
        file = Path(out) if out and not out.endswith(os.sep) and not os.path.isdir(out) else None
        self._single = file if file and file.suffix.lower() in PICTURE_SUFFIXES else None
        if self._single is not None and count > 1:
            raise ConfigError(f"{out}: one file for {count} pictures; give --out a folder.")
        if file and self._single is None:
            ending = file.suffix
            if _of_a_picture(ending.lower()):  # a file was meant, as in apple.gif; folders may have dots, too
                raise ConfigError(f"{out}: {ending} is no picture format that can be written; use one of "
                                  f"{', '.join(PICTURE_SUFFIXES)}, or {out}{os.sep} for a folder.")
        self._folder = Path(out) if out else Path(default_folder)
        if count:  # pictures that are sure to come
            require_room(self._single.parent if self._single else self._folder)
        self._used = {os.path.basename(one) for one in sources if os.path.realpath(os.path.dirname(one)) ==
                      os.path.realpath(self._folder)}

    def next(self, stem: str, ending: str = "") -> Path:
        """A path that this run has not used, from any text."""
        if self._single is not None:
            return self._single
        plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in stem).strip("._")[:60] or "picture"
        return self._folder / self._unused(plain, ending, ".png")

    def named(self, stem: str, ending: str = "", suffix: str = ".png") -> Path:
        """The one file that was asked for, or one in the folder named so, numbered if this run used the name."""
        return self._single or self._folder / self._unused(stem, ending, suffix)

    def _unused(self, stem: str, ending: str, suffix: str) -> str:
        while len(os.fsencode(stem)) > MOST_BYTES:
            stem = stem[:-1]
        name, number = f"{stem}{ending}{suffix}", 1
        while name in self._used:
            number += 1
            name = f"{stem}{ending}_{number}{suffix}"
        self._used.add(name)
        return name


def save_picture(image: Image.Image, path: Path) -> Path:
    """Write `image`, making its folder; when the disk is full, what was there stays.

    Raises:
        ImageError: the place cannot be written, or its suffix is no picture format.
    """
    try:
        kind = _format(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            image.save(file, kind)
    except OSError as error:
        raise ImageError(f"{path}: cannot be written ({disk_reason(error)}).") from error
    except ValueError as error:
        raise ImageError(f"{path}: cannot be written ({error}).") from error
    return path


def _format(path: Path) -> str:
    """Pillow's name of the format that a suffix stands for; raises ValueError for one that it cannot write."""
    Image.init()
    kind = Image.registered_extensions().get(path.suffix.lower(), "")
    if kind not in Image.SAVE:
        raise ValueError(f"unknown file extension: {path.suffix}")
    return kind


def require_picture_place(flag: str, file: str) -> None:
    """Refuse a file of a flag that a picture could not be written to, before long work is done for it.

    Raises:
        ConfigError: no suffix of a picture, a folder, or a place that cannot be written.
    """
    path = Path(file)
    try:
        _format(path)
    except ValueError as error:
        raise ConfigError(f"{flag} {file!r}: not the name of a picture file, such as codes.png ({error}).") from error
    if path.is_dir():
        raise ConfigError(f"{flag} {file!r}: this is a folder; name a file in it.")
    require_room(path.parent)


def require_room(folder: Path) -> None:
    """Refuse a folder that could not be written, before long work is done for it (`ConfigError`); leaves no file."""
    try:
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({disk_reason(error)}).") from error


def write_text(text: str, path: str | Path) -> None:
    """Write a text file, making its folder. Raises ConfigError: the place cannot be written."""
    with writing(path, ConfigError):
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")  # a file name need not be UTF-8
        except ValueError as error:  # a null byte in the name
            raise ConfigError(f"{path}: cannot be written ({first_line(error)}).") from error


def cat_picture() -> Path:
    """The default picture of programs."""
    return project_root(Path(__file__).parent) / "images" / "cat.jpg"


def emit(args: argparse.Namespace, record: dict[str, Any], plain: str) -> None:
    """One result on stdout: a JSON line with `--json`, else the plain text."""
    print(json.dumps(record, ensure_ascii=False) if args.json else plain, flush=True)
