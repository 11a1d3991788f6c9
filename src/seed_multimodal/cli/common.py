"""Shared by the commands: flags, loading a system, batches with one outcome for each file, and saving.

Results go to stdout; what runs where, progress and errors go to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from seed_multimodal.config import project_root
from seed_multimodal.disk import disk_reason, replacing, writing
from seed_multimodal.entry import DONE, SOME_FAILED, add_debug, add_device, log_line, whole_number
from seed_multimodal.errors import CodesError, ConfigError, GenerationError, ImageError, RequestError
from seed_multimodal.lavit.ratios import RATIOS
from seed_multimodal.quiet import quiet_libraries

T = TypeVar("T")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
KEPT_RATIOS = ("restore", "keep", "square")  # `images.aspect.Ratio`
ITEM_ERRORS = (ImageError, CodesError, GenerationError, RequestError)  # of one image or text; others end the command


# ---- flags


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


def add_batch(parser: argparse.ArgumentParser, size: int) -> None:
    """`--batch-size`."""
    parser.add_argument("--batch-size", type=whole_number(1), default=size, metavar="N",
                        help="images or texts at once (default: %(default)s)")


def add_out(parser: argparse.ArgumentParser, default: str = "outputs") -> None:
    """`--out` of commands that save images."""
    parser.add_argument("--out", metavar="PATH", default=default,
                        help="folder, or a file for one image (default: %(default)s)")


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Flags of text generation; the defaults are the system's own settings."""
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, metavar="N")
    group.add_argument("--temperature", type=float, metavar="T", help="0: greedy")
    group.add_argument("--top-p", type=float, metavar="P", help="0: greedy")
    group.add_argument("--num-beams", type=int, metavar="N")


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """Flags of the de-tokenizer; the defaults are its own settings."""
    group = parser.add_argument_group("drawing")
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    group.add_argument("--guidance-scale", type=float, metavar="G")


def add_beside(parser: argparse.ArgumentParser) -> None:
    """Flags of drawing beside a source or condition image."""
    parser.add_argument("--image-guidance-scale", type=float, metavar="G", help="SEED-X: towards that image")
    parser.add_argument("--ratio", choices=(*KEPT_RATIOS, *RATIOS), help="of the result; SEED-X: restore or keep that "
                        "of the source or condition image, or square as released (default: restore); LaVIT: 3:2 …")


def add_codes(parser: argparse.ArgumentParser, kind: Callable[[str], Any] | None = None, more: str = "") -> None:
    """`--codes` of commands that draw; `more`: what else its type `kind` takes."""
    parser.add_argument("--codes", type=kind or code_counts, metavar="N,N,…", help="progressive drawing: the image "
                        f"after the first N codes; several numbers (4,8,16,32): one image each, and a sheet of them"
                        f"{more}")


def code_counts(text: str) -> list[int]:
    """The type of `--codes`: numbers of codes, `8` or `4,8,16,32`, each once."""
    return list(dict.fromkeys(whole_number(1)(word.strip()) for word in text.split(",")))


def generation_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The generation flags that were given, as keyword arguments of a system's methods."""
    names = ("max_new_tokens", "temperature", "top_p", "num_beams")
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def drawing_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The drawing flags that were given, as keyword arguments of the de-tokenizer."""
    names = {"steps": "num_inference_steps", "guidance_scale": "guidance_scale",
             "image_guidance_scale": "image_guidance_scale", "ratio": "ratio", "height": "height", "width": "width"}
    return {ours: getattr(args, flag) for flag, ours in names.items() if getattr(args, flag, None) is not None}


# ---- loading


def load_system(args: argparse.Namespace, **options: Any) -> Any:
    """The system that the flags describe; `options`: of `MultimodalSystem.from_pretrained`, over the flags."""
    with loading(args):
        from seed_multimodal.device import limit_threads
        from seed_multimodal.system.base import MultimodalSystem

        system = MultimodalSystem.from_pretrained(
            **{**_flags(args, "device", "dtype", "offload", "quantization"), "log": log_line, **options})
        limit_threads(system.llm, system.images.model)
    return system


def load_images(args: argparse.Namespace, **options: Any) -> Any:
    """The image side alone of the system that the flags describe; `options`: of `open_images`, over the flags."""
    with loading(args):
        from seed_multimodal.device import limit_threads
        from seed_multimodal.system.images import open_images

        images = open_images(**{**_flags(args, "device", "dtype", "offload"), "log": log_line, **options})
        limit_threads(images.model)
    return images


def _flags(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return {"name": getattr(args, "model", None), **given}


@contextlib.contextmanager
def loading(args: argparse.Namespace) -> Iterator[None]:
    """Libraries are quiet unless `--debug`, and what they print goes to stderr."""
    quiet_libraries(args.debug)
    with contextlib.redirect_stdout(sys.stderr):
        yield


def cat_image() -> Path:
    """The default image of programs."""
    return project_root(Path(__file__).parent) / "images" / "cat.jpg"


# ---- batches


@dataclass
class Outcomes:
    """Counts successes; prints one sentence for each failure, and a summary."""

    total: int
    debug: bool = False
    failed: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def one(self, name: str) -> Iterator[None]:
        """Run the work on one image or text; its error is printed and counted."""
        try:
            yield
        except ITEM_ERRORS as error:
            if self.debug:
                raise
            self.failed.append(name)
            text = str(error)
            log_line(f"seed: {text if Path(name).name in text else f'{name}: {text}'}")

    def opened(self, names: Iterable[str], open_image: Callable[[str], Image.Image]
               ) -> Iterator[tuple[str, Image.Image]]:
        """Each readable image with its name."""
        for name in names:
            image = None
            with self.one(name):
                image = open_image(name)
            if image is not None:
                yield name, image

    def results(self, named: Iterable[tuple[str, Any]], work: Callable[[list[Any]], Sequence[T]], batch_size: int
                ) -> Iterator[tuple[str, T]]:
        """Each name with its result of `work`, which gets batches of values; of a batch that fails, one by one."""
        source = iter(named)
        while batch := list(itertools.islice(source, batch_size)):
            yield from self._batch(batch, work)

    def _batch(self, batch: list[tuple[str, Any]], work: Callable[[list[Any]], Sequence[T]]) -> list[tuple[str, T]]:
        found: list[tuple[str, T]] = []
        names = [name for name, _ in batch]
        if len(batch) > 1:
            try:
                return list(zip(names, work([value for _, value in batch]), strict=True))
            except ITEM_ERRORS:
                pass  # each on its own tells which
        for name, value in batch:
            with self.one(name):
                found += zip([name], work([value]), strict=True)
        return found

    def finish(self) -> int:
        """The exit code: 0, or 1 with a summary where something failed."""
        if not self.failed:
            return DONE
        log_line(f"seed: {self.total - len(self.failed)} of {self.total} done, {len(self.failed)} failed: "
                 f"{', '.join(self.failed)}.")
        return SOME_FAILED


def noted(named: Iterable[tuple[str, T]], note: Callable[[T], str]) -> Iterator[tuple[str, T]]:
    """Images or texts as they come; what `note` says of one that is unlike the training data is logged."""
    for name, value in named:
        if sentence := note(value):
            log_line(f"{name}: {sentence}")
        yield name, value


# ---- saving


class Outputs:
    """Files for results: in a folder, or the one file that was asked for. No name is used twice, nor that of `sources`.

    Raises:
        ConfigError: one file for several images; a folder that cannot be written.
    """

    def __init__(self, out: str, count: int = 1, sources: Iterable[str | Path] = ()) -> None:
        path = Path(out)
        is_file = path.suffix.lower() in IMAGE_SUFFIXES and not out.endswith(os.sep) and not path.is_dir()
        if is_file and count > 1:
            raise ConfigError(f"{out}: one file for {count} images; give --out a folder.")
        self._file, self._folder = path if is_file else None, path
        require_room(path.parent if is_file else path)
        self._used = {Path(one).resolve() for one in sources}

    def next(self, stem: str, suffix: str = ".png") -> Path:
        """The file of the next result, in a folder named after `stem`."""
        if self._file is not None:
            return self._file
        stem = os.fsencode(stem)[:180].decode("utf-8", "ignore")  # file systems take 255 bytes
        names = (f"{stem}{suffix}" if number == 1 else f"{stem}_{number}{suffix}" for number in itertools.count(1))
        path = next(path for name in names if (path := self._folder / name).resolve() not in self._used)
        self._used.add(path.resolve())
        return path


def slug(text: str) -> str:
    """Any text as the stem of a file's name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text).strip("._")[:60] or "image"


def save_image(image: Image.Image, path: Path) -> Path:
    """Write `image`, making its folder; an image that is there already stays until the new one is whole.

    Raises:
        ImageError: the place cannot be written, or its suffix is no image format.
    """
    try:
        Image.init()
        kind = Image.registered_extensions()[path.suffix.lower()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            image.save(file, kind)
    except KeyError as error:
        raise ImageError(f"{path}: {path.suffix!r} is no image format; use {', '.join(IMAGE_SUFFIXES)}.") from error
    except OSError as error:
        raise ImageError(f"{path}: cannot be written ({disk_reason(error)}).") from error
    return path


def require_room(folder: Path) -> None:
    """Raise ConfigError for a folder that cannot be written, before long work is done for it."""
    try:
        with tempfile.TemporaryFile(dir=next(one for one in (folder.absolute(), *folder.absolute().parents)
                                             if one.exists())):
            pass
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({disk_reason(error)}).") from error


def write_text(text: str, path: str | Path) -> None:
    """Write a text file, making its folder. Raises ConfigError: the place cannot be written."""
    with writing(path, ConfigError):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")


def emit(args: argparse.Namespace, record: dict[str, Any], plain: str) -> None:
    """One result on stdout: a JSON line with `--json`, else the plain text."""
    print(json.dumps(record, ensure_ascii=False) if args.json else plain, flush=True)
