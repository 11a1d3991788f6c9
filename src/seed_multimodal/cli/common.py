"""Shared code of commands: flags, loading of systems, processing of items, saving.

Results are printed to stdout; device, progress and errors to stderr.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import mimetypes
import os
import pkgutil
import sys
import unicodedata
from argparse import (
    Action,
    ArgumentError,
    ArgumentParser,
    Namespace,
    RawDescriptionHelpFormatter,
    _ActionsContainer,
    _SubParsersAction,
)
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO, TypeVar

from PIL import Image

from seed_multimodal import entry
from seed_multimodal.config import project_root, read_table
from seed_multimodal.disk import file_stem, writable_folder, writing
from seed_multimodal.entry import bounded_int, log_line
from seed_multimodal.errors import (
    CodesError,
    ConfigError,
    GenerationError,
    ImageError,
    RequestError,
    short_name,
)
from seed_multimodal.images.io import StoredImage, read_string, save_image
from seed_multimodal.models.registry import model_cards
from seed_multimodal.pipelines.config import system_names
from seed_multimodal.progress import quiet_libraries
from seed_multimodal.settings import Dataclass, nearest

if TYPE_CHECKING:
    from seed_multimodal.images.io import ImageSource
    from seed_multimodal.pipelines.base import MultimodalSystem
    from seed_multimodal.pipelines.config import SystemConfig
    from seed_multimodal.pipelines.images import ImageCodec, Log

    Commands = _SubParsersAction[ArgumentParser]

Options = dict[str, Any]  # keyword arguments of a system's methods
Item = TypeVar("Item")
Result = TypeVar("Result")

FLAGS: dict[str, dict[str, Options]] = read_table(Path(__file__).with_name("flags.yaml"))
NUMBERS = {"int": int, "float": float}  # types in that file, others as "module:function"
STDOUT = ("-", "/dev/stdout")  # values of `--out`
READERS = 4  # threads
N_CHECKED = 16  # images that are opened before a model loads
RATIO_MODES = ("restore", "keep", "square")  # `images.views.Ratio`
# Errors of one item; others end the command.
ITEM_ERRORS = (ImageError, CodesError, GenerationError, RequestError)
# Flags that are keyword arguments of `MultimodalSystem.from_pretrained`; the first also of
# `open_images`.
LOADING_FLAGS = ("device", "dtype", "offload")
LANGUAGE_MODEL_FLAGS = (
    "image_dtype quantization compiled kv_cache max_running engine url gguf".split()
)
# Flags that are keyword arguments of a system's methods.
SETTINGS = (
    "max_new_tokens temperature top_p top_k num_beams guidance "  # of generation
    "num_inference_steps guidance_scale image_guidance_scale ratio height width preset"
).split()


# ---- flags


class ProgramParser(ArgumentParser):
    """Names the choice that is nearest to an unknown one."""

    def _check_value(self, action: Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except ArgumentError as error:
            error.message += nearest(str(value), map(str, action.choices or ()))
            raise


def program_parser(program: str, description: str) -> ArgumentParser:
    """The parser of a program whose description has lines of its own."""
    return ProgramParser(
        prog=program, description=description, formatter_class=RawDescriptionHelpFormatter
    )


def add_common(
    parser: ArgumentParser,
    model: str = "nano",
    *,
    seed: int = 0,
    out: str = "",
    batch_size: int = 0,
    language: bool = False,
    generation: bool = False,
    drawing: bool = False,
) -> None:
    """Flags of commands with a system.

    model, seed, out, batch_size: defaults; "" or 0: no such flag.
    language, generation, drawing: with the flags of a language model, of text generation, of the
        de-tokenizer, whose defaults are the system's.
    """
    # Which system, and where it runs.
    parser.add_argument(
        "--model",
        default=model,
        help=f"{', '.join(system_names())}, or a system folder (default: %(default)s)",
    )
    entry.add_device(parser)
    parser.add_argument("--seed", type=int, default=seed, help="random seed")
    # Files and batches.
    if out:
        parser.add_argument(
            "--out",
            default=out,
            help="folder, or for one image a file or - (standard output) (default: %(default)s)",
        )
    if batch_size:
        parser.add_argument(
            "--batch-size", type=bounded_int(1), default=batch_size, help="default: %(default)s"
        )
    # Its models.
    if language:
        add_flags(parser, "language model")
        add_flags(parser, "offload")
        add_flags(parser, "engine")
    if generation:
        add_flags(parser, "generation")
    if drawing:
        add_flags(parser, "drawing")


def add_flags(parser: _ActionsContainer, table: str, chosen: Sequence[str] | None = None) -> None:
    """The flags of a table in `flags.yaml`, or the chosen ones of them."""
    for names, row in FLAGS[table].items():
        if chosen is not None and names not in chosen:
            continue
        options = dict(row)
        if "minimum" in options:
            options["type"] = bounded_int(options.pop("minimum"))
        elif "type" in options:
            name = options["type"]
            options["type"] = NUMBERS.get(name) or pkgutil.resolve_name(name)
        parser.add_argument(*names.split(), **options)


def add_command(
    commands: Commands, work: Callable[[Namespace], int], name: str = "", help: str | None = None
) -> ArgumentParser:
    """The parser of the command that runs the function `work`, with its table of `flags.yaml`.

    name: of the table; its last word is the command's. By default name and help are the function's.
    """
    name = name or work.__name__
    text = help or work.__doc__
    parser = commands.add_parser(name.rpartition(" ")[2], help=text, description=text)
    if name in FLAGS:
        add_flags(parser, name)
    parser.add_argument("--json", action="store_true", help="JSON objects on stdout, one a line")
    entry.add_debug(parser)
    parser.set_defaults(work=work)
    return parser


def add_settings(parser: ArgumentParser, kind: Dataclass) -> None:
    """A flag for each setting of a dataclass that has a help text; values are those of the text."""
    for field in fields(kind):
        options = {
            name: field.metadata[name]
            for name in ("help", "metavar", "choices", "const")
            if name in field.metadata
        }
        if "help" not in options:
            continue
        if "const" in options:
            options["action"] = "store_const"
        elif "list" in str(field.type):
            options |= {"action": "extend", "nargs": "+"}
        if field.default is MISSING:
            options["required"] = True
        flags = field.metadata.get("flag", "--" + field.name.replace("_", "-"))
        parser.add_argument(*flags.split(), dest=field.name, **options)


def set_flags(args: Namespace, kind: Dataclass) -> Options:
    """The settings of a dataclass that flags have set."""
    return values_of(args, *(field.name for field in fields(kind)))


def _ratios() -> list[str]:
    """The aspect ratios of drawings, of all families."""
    ratios: list[str] = []
    for card in model_cards().values():
        ratios += card.ratios
    return list(dict.fromkeys(ratios))


def add_size(parser: ArgumentParser) -> None:
    """Flags of the size of a drawing."""
    parser.add_argument(
        "--ratio", choices=_ratios(), help="LaVIT: width to height of the drawing (default: 1:1)"
    )
    add_flags(parser, "size")


def add_condition_flags(parser: ArgumentParser) -> None:
    """Flags of drawing with a source or condition image."""
    add_flags(parser, "condition")
    add_flags(parser, "size")
    parser.add_argument(
        "--ratio",
        choices=(*RATIO_MODES, *_ratios()),
        help="SEED-X: restore (default) or keep that of "
        "the source or condition image, or square as the original; LaVIT: width to height",
    )


def chosen_settings(args: Namespace) -> Options:
    """The flags of generation and drawing that were set."""
    return values_of(args, *SETTINGS)


# ---- loading


def load_system(
    args: Namespace,
    name: str | SystemConfig | None = None,
    *,
    image_device: str | None = None,
    load_decoder: bool = True,
    log: Log = log_line,
) -> MultimodalSystem:
    """The system set by the flags.

    name: instead of `--model`.
    image_device, load_decoder, log: of `MultimodalSystem.from_pretrained`.
    """
    with loading(args):
        from seed_multimodal.device import limit_threads
        from seed_multimodal.pipelines.base import MultimodalSystem

        system = MultimodalSystem.from_pretrained(
            name or args.model,
            image_device=image_device,
            load_decoder=load_decoder,
            log=log,
            **values_of(args, *LOADING_FLAGS, *LANGUAGE_MODEL_FLAGS),
        )
        limit_threads(system.llm, system.images.model)
    return system


def load_images(args: Namespace, name: str | SystemConfig | None = None) -> ImageCodec:
    """The image encoder and decoder of a system (default: `--model`)."""
    with loading(args):
        from seed_multimodal.device import limit_threads
        from seed_multimodal.pipelines.images import open_images

        codec: ImageCodec = open_images(
            name or args.model, log=log_line, **values_of(args, *LOADING_FLAGS)
        )
        limit_threads(codec.model)
    return codec


def values_of(args: Namespace, *flags: str) -> Options:
    """The values of those flags that the program has and that are set."""
    values = vars(args)
    return {flag: values[flag] for flag in flags if values.get(flag) is not None}


@contextlib.contextmanager
def loading(args: Namespace) -> Iterator[None]:
    """Silence libraries unless `--debug`, and redirect their output to stderr."""
    quiet_libraries(args.debug)
    # stdout has results only.
    with contextlib.redirect_stdout(sys.stderr):
        yield


def cat_image() -> Path:
    """The default image of programs."""
    return project_root(Path(__file__).parent) / "images" / "cat.jpg"


# ---- one result for each image or text


def run_command(args: Namespace) -> int:
    """The exit code of a command, whose files are checked before a model loads.

    Raises ConfigError: the file of `--out` is one that another argument names.
    """
    # 1. The result replaces no input, by whatever name.
    out = getattr(args, "out", None) or ""
    for flag, value in vars(args).items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and path.lower().startswith("file:/"):
                path = str(read_string(path))
            are_files = isinstance(path, str) and os.path.isfile(path) and os.path.isfile(out)
            if are_files and flag != "out" and os.path.samefile(path, out):
                raise ConfigError(f"{out}: is {path}, which is used here and would be gone.")

    # 2. Images that cannot be opened are left out.
    images = getattr(args, "images", None)
    if not isinstance(images, list) or not images:
        return args.work(args)
    unreadable = []
    for name, source in image_sources(images[:N_CHECKED]).items():
        try:
            if not callable(source):  # what is read only once
                StoredImage(source)
        except ImageError as error:
            unreadable.append(name)
            log_line(f"seed: {error}")
    args.images = [name for name in images if name not in unreadable]
    code = args.work(args) if args.images else entry.DONE
    return (code or entry.SOME_FAILED) if unreadable else code


def image_sources(names: Sequence[str]) -> dict[str, ImageSource]:
    """Name → the image: a file's name, or for standard input (`-`) and pipes what opens them once,
    since a failed batch is read again."""
    sources: dict[str, ImageSource] = {}
    for name in names:
        if name == "-":
            sources[name] = lambda: sys.stdin.buffer
        elif os.path.exists(name) and Path(name).is_fifo():
            sources[name] = functools.cache(functools.partial(open, name, "rb"))
        else:
            sources[name] = name
    return sources


def run_each(
    args: Namespace,
    names: Sequence[str],
    show: Callable[[str, Result], None],
    work: Callable[[str], Result],
) -> int:
    """`show` each image or text with its result of `work`; returns the exit code."""
    return run_batches(args, names, show, lambda batch: [work(name) for name in batch], 1)


def read_ahead(
    names: Sequence[str], read: Callable[[str], Item], size: int
) -> Iterator[list[Future[Item]]]:
    """Batches of what threads read, the next one while a batch is used."""
    pool = ThreadPoolExecutor(READERS)
    try:
        upcoming = [pool.submit(read, name) for name in names[:size]]
        for start in range(size, len(names) + size, size):
            batch = upcoming
            upcoming = [pool.submit(read, name) for name in names[start : start + size]]
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def run_batches(
    args: Namespace,
    names: Sequence[str],
    show: Callable[[str, Result], None],
    work: Callable[[Sequence[Any]], Sequence[Result]],
    size: int,
    read: Callable[[str], Any] = str,
) -> int:
    """`show` each image or text with its result of `work`; returns the exit code.

    size: of the batches.
    read: threads make of each name what `work` gets; by default the name.
    Items of a failed batch are retried one by one; failures are logged and counted.
    """
    failed = []
    batches = read_ahead(names, read, size)
    for start, batch in zip(range(0, len(names), size), batches, strict=True):
        # 1. The batch at once.
        results: Sequence[Result] | None = None
        if len(batch) > 1:
            with contextlib.suppress(*ITEM_ERRORS):
                results = work([item.result() for item in batch])

        # 2. Its results, or if it failed its items one by one.
        for index, item in enumerate(batch):
            name = names[start + index]
            try:
                result = work([item.result()])[0] if results is None else results[index]
                show(name, result)
            except ITEM_ERRORS as error:
                if args.debug:
                    raise
                label = short_name(name)
                file_name = short_name(Path(name).name)
                if not name.strip():
                    label = file_name = f"item {start + index + 1}"
                failed.append(label)
                # Most errors name the file.
                prefix = "seed" if file_name in str(error) else f"seed: {label}"
                log_line(f"{prefix}: {error}")

    # 3. What failed.
    if not failed:
        return entry.DONE
    n_done = len(names) - len(failed)
    log_line(f"seed: {n_done} of {len(names)} done, {len(failed)} failed: {', '.join(failed)}.")
    return entry.SOME_FAILED


# ---- saving


class Outputs:
    """Where images are saved: files in a folder, a single image file, or standard output.

    out: the folder; a file with a suffix that Pillow can write; or `-`: standard output, as PNG.
    count: images to save.

    Raises ConfigError: one file for many images, a suffix of images that Pillow cannot write, a
    folder that cannot be written.
    """

    def __init__(self, out: str, count: int = 1) -> None:
        self.path = Path(out)
        self._names = set[str]()  # of files of this run, as file systems compare them
        self._stdout: BinaryIO | None = None
        # A folder may be named like an image.
        suffix = self.path.suffix.lower()
        kind = mimetypes.guess_type(f"x{suffix}", strict=False)[0] or ""
        is_image = kind.startswith("image/") or suffix in (".jxl", *Image.registered_extensions())
        self.is_file = out in STDOUT or (is_image and not self.path.is_dir())
        if self.is_file and count > 1:
            raise ConfigError(f"{out}: one file for several images; give --out a folder.")
        if out in STDOUT:
            self._stdout = entry.claim_stdout().buffer
            return
        if self.is_file and not _can_save(suffix):
            suffixes = filter(_can_save, sorted(Image.registered_extensions()))
            raise ConfigError(f"{out}: cannot be written; suffixes that can: {' '.join(suffixes)}.")
        writable_folder(self.path.parent if self.is_file else self.path, ConfigError)

    def save(self, image: Image.Image, stem: str, tag: str = "", suffix: str = ".png") -> str:
        """Save the next result and return its path; `-` for standard output.

        In a folder its name is `stem`, cut to what file systems allow, then `tag`; from the second
        one of a name on with a number.
        """
        if self._stdout is not None:
            image.save(self._stdout, "PNG")
            return "-"
        if self.is_file:
            return str(save_image(image, self.path))
        stem = file_stem(stem) + tag
        for count in itertools.count(1):
            name = f"{stem}{suffix}" if count == 1 else f"{stem}_{count}{suffix}"
            # Some file systems ignore case, and how letters with accents are composed.
            key = unicodedata.normalize("NFC", name).casefold()
            if key not in self._names:
                break
        self._names.add(key)
        return str(save_image(image, self.path / name))


def _can_save(suffix: str) -> bool:
    """Whether Pillow writes RGB images of this suffix, which depends on how it was built."""
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), Image.registered_extensions()[suffix])
    except (OSError, ValueError, KeyError):
        return False
    return True


def open_lines(out: str) -> TextIO:
    """A stream for lines of results: a file, which is replaced, or standard output for `-`. Raises
    ConfigError: it cannot be written."""
    if out in STDOUT:
        return entry.claim_stdout()
    with writing(out, ConfigError):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        # Line by line, so that a killed run has written what it printed.
        return open(out, "w", buffering=1, encoding="utf-8", errors="backslashreplace")


def next_free_path(folder: Path, pattern: str) -> Path:
    """The first free file of a numbered `pattern` in `folder`, such as `grid-{:03d}.png`."""
    paths = (folder / pattern.format(index) for index in itertools.count())
    return next(path for path in paths if not path.exists())


def source_stem(name: str) -> str:
    """The stem of the results of an image that `name` names."""
    if name == "-" or name.lower().startswith("data:"):
        return "image"
    return Path(name).stem


def emit(args: Namespace, record: Mapping[str, object], plain: str) -> None:
    """One result on stdout: a JSON line with `--json`, else the plain text."""
    if args.json:
        print_json(record)
    else:
        print(plain)


def print_json(record: Mapping[str, object], stream: TextIO | None = None) -> None:
    """Print a line of JSON, whatever the names in it; `stream`: default stdout."""
    stream = stream or sys.stdout
    # In UTF-8 the stream's own escapes (\udce9) are JSON, in other encodings (\xe9) they are not.
    is_utf8 = (stream.encoding or "").lower() == "utf-8"
    print(json.dumps(record, ensure_ascii=not is_utf8), file=stream)
